"""Variants of kernels: what would be timed on a device, and that what builds it checks it (here by the torch backend)."""

import pickle
import random
import sys

import pytest
import torch

from benchmarks import attention, copies, experts, measure
from benchmarks.case import TINY, Case
from benchmarks.measure import Bench
from benchmarks.work import Setup
from hybridcache.kernels.torch_ops.attention import paged_decode

CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Bench:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return Bench(Setup.on(CPU, seed), None)


def test_the_table_names_cases_and_variants_once():
    pytest.importorskip("triton")
    from benchmarks.variants import BUILD, cases, table, variants

    found = cases([])
    assert {case.operation for case in found} == {axis.operation for axis in table()} <= set(BUILD)
    keys = [(case.operation, case.label) for case in found]
    assert len(set(keys)) == len(keys)
    for operation in {axis.operation for axis in table()}:
        assert len(variants(operation, "")) == sum(len(a.values) for a in table() if a.operation == operation) > 0
    assert pickle.loads(pickle.dumps(found)) == found


def test_variants_are_chosen_by_name():
    pytest.importorskip("triton")
    from benchmarks.variants import cases, variants

    names = variants("paged_prefill", "Ring")
    assert names
    assert all("Ring" in name for name in names)
    assert {case.operation for case in cases(["experts"])} == {"experts"}


@pytest.mark.parametrize("queries", [0, 1, 33])
def test_the_last_tokens_of_long_prompts(bench, queries):
    case = Case("paged_prefill", (700, 40), TINY, "bfloat16", 8, 11, "block_major", queries=queries)
    (row,) = bench.rows(case)
    assert row["error"] is None
    assert row["rel_error"] <= measure.TOLERANCE
    assert row["shape"] == (f"2x{queries} of 700" if queries else "2x700")


def test_experts_are_checked(bench):
    (row,) = bench.rows(Case("experts", (random.randint(1, 40),), TINY, "float32"), experts.mixture)
    assert row["error"] is None
    assert row["rel_error"] < 1e-5
    assert row["tflops"] > 0


def test_a_wrong_variant_is_a_row_of_its_own(bench):
    case = Case("paged_decode", (200, 89), TINY, "bfloat16", 8, 11, "block_major", with_torch=False)
    more = {"right": paged_decode, "wrong": lambda *args: -paged_decode(*args)}
    rows = {row["impl"]: row for row in bench.rows(case, lambda *at: attention.decode(*at, more))}
    assert rows["right"]["median_ms"] > 0
    assert "wrong result" in rows["wrong"]["error"]


def test_a_swap_is_checked_in_both_directions(bench):
    for operation in ("swap_out", "swap_in"):
        (row,) = bench.rows(Case(operation, (1,) * 4, TINY, "uint8"), copies.swap)
        assert (row["impl"], row["rel_error"]) == ("copy_engine", 0.0)


def test_a_stage_that_fails_or_hangs_leaves_the_others(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu
    from benchmarks.gpu import Stage

    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    write = python("import sys, pathlib; pathlib.Path(sys.argv[1], 'found').write_text('x')")
    stages = {
        "fails": Stage((python("raise SystemExit(3)"), (*write, "{out}")), 60),
        "hangs": Stage((python("import time; time.sleep(600)"),), 2),
        "works": Stage(((*write, "{out}"),), 60),
        "other": Stage((), 1),
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    found = gpu.run_stages(["works", "hangs", "fails"], tmp_path, 600)
    assert {name: stage["status"] for name, stage in found.items()} == {"fails": 3, "hangs": 124, "works": 0}
    assert (tmp_path / "found").read_text() == "x"
    assert (tmp_path / "summary.json").exists()


def test_stages_call_what_exists():
    from importlib.util import find_spec

    from benchmarks.gpu import ROOT, STAGES

    for stage in STAGES.values():
        for command in stage.commands:
            if command[1] == "-m":
                assert find_spec(command[2]), command[2]
            else:
                name = command[2].removeprefix("+experiment=")
                assert (ROOT / "conf" / "experiment" / f"{name}.yaml").exists()
