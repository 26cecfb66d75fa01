"""Printed tables fit the terminal; the best is bold among those that served the same requests."""

import io
import math

import pandas as pd
import pytest
from rich.console import Console

from experiments.lib.printed_tables import paired_differences, print_capacity, print_runs, print_throughput

RATES = {"shared_pool_carve": 441.0, "padded_page": 449.0, "static_split_tuned": 430.0, "byte_exact": 460.0}


def frame(refused: dict[str, int] | None = None, repetitions: int = 1) -> pd.DataFrame:
    refused = refused or {}
    common = {
        "phase": "simulation", "workload": "chat", "model": "qwen3_next_80b_a3b", "device": "cost model: 4 x H100",
        "backend": None, "budget_bytes": 5 << 30, "tp_size": 4, "requests_offered": 900, "residents_peak": 142,
        "utilization_mean": 0.807, "held_bytes_mean": 0.821 * (5 << 30), "preemptions": 14, "recomputed_tokens": 1_234_567,
        "recomputed_tokens_preemption": 1_234_567, "recomputed_tokens_failure": 0,
        "ttft_p50_s": 2.27, "ttft_p99_s": 653.0, "tpot_p50_s": 0.0256, "workload_source": "chat seed=0", "tokens_sha256": None,
        "searched_options": "", "dtype": "bfloat16", "state_dtype": "float32", "prompt_tokens": 900, "output_tokens": 900,
    }  # fmt: skip
    made = []
    for repetition in range(repetitions):
        for strategy, rate in RATES.items():
            less = refused.get(strategy, 0)
            row = {**common, "strategy": strategy, "repetition": repetition, "seed": repetition}
            made.append(
                {
                    **row,
                    "requests_refused": less,
                    "requests_served": 900 - less,
                    "output_tokens_per_s": rate + 7 * repetition,
                }
            )
    return pd.DataFrame(made)


def printed(show, *arguments, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False, force_terminal=True, no_color=True)
    show(console, *arguments)
    return console.file.getvalue()


def plain(text: str) -> str:
    return text.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")


def bold(text: str) -> set[str]:
    return {part.split("\x1b[0m")[0] for part in text.split("\x1b[1m")[1:]}


def capacity() -> pd.DataFrame:
    lengths = (12, 128, 545, 2000, 8192, 32768, 65536, 131072)
    rows = []
    for strategy in RATES:
        for length in lengths:
            rows.append(
                {**frame().iloc[0].to_dict(), "phase": "capacity", "strategy": strategy, "workload": f"length={length}"}
            )
            rows[-1] |= {"held_bytes_per_request": 19.6 * 2**20, "residents_peak": 10**6 // length}
    return pd.DataFrame(rows)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_and_nothing_is_cut(width: int) -> None:
    texts = [
        printed(print_runs, frame({"padded_page": 12}, repetitions=2), "simulation", width=width),
        printed(print_capacity, capacity(), width=width),
        printed(print_throughput, frame(), width=width),
    ]
    for text in map(plain, texts):
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text
        for strategy in RATES:
            assert strategy in text


def test_columns_of_the_environment_decide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    console = Console(file=io.StringIO(), highlight=False)
    print_runs(console, frame(), "simulation")
    heads = [line for line in console.file.getvalue().splitlines() if "strategy" in line]
    assert len(heads) == 1, "one table where there is room"
    assert plain(printed(print_runs, frame(), "simulation")).count("strategy ") == 2, "two where there is not"


def test_who_refused_cannot_win() -> None:
    assert "449" in bold(printed(print_runs, frame(), "simulation"))
    text = printed(print_runs, frame({"padded_page": 12}), "simulation")
    assert "441" in bold(text)
    assert not {"449", "460"} & bold(text), "neither who served less nor the bound"
    assert "888" in plain(text)
    assert "compared among strategies that served 900 of 900 requests; not padded_page" in " ".join(plain(text).split())


def test_differences_are_paired_and_have_intervals() -> None:
    rows = frame(repetitions=3)
    found = paired_differences(rows, "shared_pool_carve")
    assert found["shared_pool_carve"] == "-"
    percent = [100 * ((449 + 7 * k) / (441 + 7 * k) - 1) for k in range(3)]
    mean = sum(percent) / 3
    deviation = math.sqrt(sum((p - mean) ** 2 for p in percent) / 2)
    assert found["padded_page"] == f"{mean:+.1f} ± {4.30 * deviation / math.sqrt(3):.1f} %"
    text = " ".join(plain(printed(print_runs, rows, "simulation")).split())
    assert "means of 3 repetitions, each with a stream of its own" in text
    again = " ".join(plain(printed(print_runs, rows.assign(seed=0), "simulation")).split())
    assert "means of 3 repetitions; differences" in again, "one stream, measured again"
