"""Every experiment runs in its fast form from the command line; wrong input ends with one line and status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from limits import SUBPROCESS_S

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
REQUIRED = [
    "experiment", "phase", "strategy", "workload", "repetition", "device", "model", "backend", "budget_bytes",
    "residents_peak", "useful_bytes_mean", "held_bytes_mean", "utilization_mean", "preemptions",
    "recomputed_tokens_preemption", "recomputed_tokens_failure", "requests_offered", "requests_served", "requests_refused",
    "prompt_tokens", "output_tokens", "output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tokens_sha256",
]  # fmt: skip
PHYSICAL = ["shared_pool", "shared_pool_carve", "large_block", "padded_page", "static_split", "two_ended"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SUBPROCESS_S)


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs the entry point in this process and returns the one line that it must end with."""
    monkeypatch.syspath_prepend(str(ROOT))
    import run as entry

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            entry.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stopped.value.code == 2, lines
        assert len(lines) == 1, lines
        return lines[0]

    return call


def test_every_experiment_is_listed():
    assert {"geometry", "shared_pool"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_in_fast_form(name, tmp_path):
    done = run(f"+experiment={name}", "fast=true", "tracking=disabled", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for file in ("config.yaml", "environment.json", "results.parquet"):
        assert (tmp_path / file).exists(), file
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]


def test_serve_throughput_serves_every_workload_under_every_strategy(tmp_path):
    options = ["fast=true", "tracking=disabled", "serve_trace=true", f"hydra.run.dir={tmp_path}"]
    done = run("+experiment=serve_throughput", *options)
    assert done.returncode == 0, done.stderr
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert set(REQUIRED) <= set(results.columns)
    assert set(results["strategy"]) == set(PHYSICAL)
    assert (results.groupby("workload")["strategy"].nunique() == len(PHYSICAL)).all()
    assert results.groupby("workload")["output_tokens"].first().to_dict() == {"bs1": 4, "chat": 16}
    assert (results["output_tokens_per_s"] > 0).all()
    assert "step_profile_inference" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "decode-trace.json").exists()
    events = pd.read_json(tmp_path / "events.jsonl", lines=True)
    longest = results.groupby(["strategy", "workload"])["duration_s"].max()
    for key, rows in events[events["event"] == "sample"].groupby(["strategy", "workload"]):
        assert rows["time_s"].between(0, longest[key]).all(), "time counts from the workload's beginning"
    assert events.loc[events["event"] == "request", "arrival_s"].between(0, longest.max()).all()


def test_serve_throughput_needs_physical_memory(fails, tmp_path):
    line = fails("+experiment=serve_throughput", "strategies=[byte_exact]", f"hydra.run.dir={tmp_path}")
    assert "byte_exact" in line
    line = fails("+experiment=serve_throughput", "serving.workloads={a:[1,2]}", f"hydra.run.dir={tmp_path}")
    assert "serving.workloads.a" in line


def test_shared_pool_leaves_everything(tmp_path):
    done = run("+experiment=shared_pool", "fast=true", "tracking=disabled", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert set(REQUIRED) <= set(results.columns)
    assert set(results["phase"]) == {"capacity", "simulation", "inference"}
    inference = results[results["phase"] == "inference"]
    assert list(inference["strategy"]) == PHYSICAL
    assert inference["tokens_sha256"].nunique() == 1, "float64 tokens agree"
    assert (inference["output_tokens"] > 0).all()
    for launches in inference["launches"]:
        assert {name.split("[")[1] for name in json.loads(launches)} == {"torch]"}
    assert (tmp_path / "report.html").stat().st_size > 50_000
    pictures = sorted((tmp_path / "figures").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.with_suffix(".csv").exists(), picture.name
    events = {json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()}
    assert {"capacity", "charge", "sample", "pool_map", "request"} <= events


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["+experiment=", "shared_pool"]),
        (["+experiment=shard_pool"], ["shard_pool", "shared_pool"]),
        (["+experiment=shared_pool", "model=qwen4"], ["model", "qwen4", "qwen3_next_80b_a3b"]),
        (["+experiment=shared_pool", "strategies=[shared_pool,mine]"], ["strategies", "mine", "padded_page"]),
        (["+experiment=shared_pool", "seed=abc"], ["seed", "abc"]),
        (["+experiment=shared_pool", "engine.max_runing=3"], ["max_runing"]),
        (["+experiment=shared_pool", "engine.victim=oldest"], ["victim", "oldest", "least_computed"]),
        (["+experiment=shared_pool", "kv_dtype=int3"], ["kv_dtype", "int3", "bfloat16"]),
        (["+experiment=shared_pool", "capacity.budget_gib=0.01"], ["budget_bytes", "at least"]),
        (["+experiment=shared_pool", "phases=[inference]", "inference.budget_bytes=1000"], ["budget_bytes", "1000"]),
        (["+experiment=shared_pool", "inference.model=/nowhere", "phases=[inference]"], ["model", "/nowhere", "tiny"]),
        (["+experiment=shared_pool", "workload=azure"], ["path"]),
        (
            [
                "+experiment=shared_pool",
                "strategies=[large_block]",
                "+strategy_options.large_block.kernel_block_size=48",
            ],
            ["kernel_block_size", "48"],
        ),
        (
            ["+experiment=shared_pool", "strategies=[shared_pool]", "+strategy_options.shared_pool.moed=carve"],
            ["moed"],
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, words, fails, tmp_path):
    line = fails(*arguments, "tracking=disabled", f"hydra.run.dir={tmp_path}")
    for word in words:
        assert word in line


def test_malformed_trace_names_the_line(fails, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n1.0,many,3\n")
    source = ("workload=azure", f"workload.path={trace}")
    line = fails("+experiment=shared_pool", *source, "tracking=disabled", f"hydra.run.dir={tmp_path / 'run'}")
    for word in ("trace.csv", "3", "many"):
        assert word in line


def test_no_traceback_from_the_shell(tmp_path):
    done = run("+experiment=shared_pool", "strategies=[mine]", "tracking=disabled", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: strategies='mine'")
    assert done.stderr.count("\n") == 1
