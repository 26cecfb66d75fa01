"""Measurements of kernels: what is checked, what a row says, what survives a failure, and what an experiment leaves."""

import os
import random
import sys
import time
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from isolated_deeds import deeds, refuse_odd
from limits import SUBPROCESS_S

from benchmarks import measure, peers
from benchmarks.block_tables import WAYS, measure_table
from benchmarks.case import OPERATIONS, QWEN3_NEXT_80B, TINY, Case, cpu_cases, cuda_cases, fast_cuda_cases
from benchmarks.measure import BUILDERS, COLUMNS, HOST_OPERATION, Bench, fraction
from benchmarks.processes import in_parallel, isolated
from benchmarks.timing import Ceilings, summary, time_host
from benchmarks.work import Implementation, Setup, Work

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(1 << 31)
    print(f"seed {chosen}")
    return chosen


# -- cases and rows ----------------------------------------------------------------------------------------------------


def test_cases_are_told_apart_by_their_rows():
    for cases in (cuda_cases(), fast_cuda_cases(), cpu_cases()):
        found = [(c.operation, c.shape, c.dtype, c.kernel_block, c.manager_block, c.layout) for c in cases]
        assert len(set(found)) == len(found)


def test_every_operation_has_a_builder_and_a_fast_form():
    assert set(OPERATIONS) == {*BUILDERS, HOST_OPERATION}
    assert {case.operation for case in fast_cuda_cases()} == set(OPERATIONS)


def test_shapes_asked_for_are_measured():
    found = {(case.operation, case.shape) for case in cuda_cases()}
    for shape in ("1x32768", "16x4096", "64x8192", "256x2048"):
        blocks = {case.kernel_block for case in cuda_cases() if (case.operation, case.shape) == ("paged_decode", shape)}
        assert blocks == {8, 16, 32, 64, 1056}
        managers = {
            case.manager_block for case in cuda_cases() if (case.operation, case.shape) == ("paged_decode", shape)
        }
        assert managers == {8, 88, 176, 352, 704, 1056}
        assert ("table_expansion", shape) in found
    for shape in ("1x2048", "1x8192", "1x32768", "16x1024", "1x8192 ckpt512"):
        assert ("gdn_delta", shape) in found
    assert {shape for operation, shape in found if operation == "gdn_decode"} == {"1", "8", "64", "256"}


@pytest.mark.parametrize("case", list(cpu_cases()), ids=lambda case: f"{case.operation}-{case.label}".replace(" ", "-"))
def test_rows_on_a_cpu(case, seed):
    rows = list(Bench(Setup.on(CPU, seed), None).rows(case))
    assert rows
    for row in rows:
        assert tuple(row) == COLUMNS
        assert row["error"] is None
        assert 0 <= row["rel_error"] <= measure.TOLERANCE
        assert row["fraction"] is None, "a CPU has no ceiling here"
        if row["impl"] in ("exclusive", "carve"):
            assert row["median_ms"] is None, "nothing runs"
        else:
            assert row["median_ms"] > 0


@pytest.mark.parametrize("lengths", [(32_768,), (5, 88, 89, 1000)])
def test_table_expansion(lengths, seed):
    case = Case("table_expansion", lengths, QWEN3_NEXT_80B)
    rows = {row["impl"]: row for row in Bench(Setup.on(CPU, seed), None).rows(case)}
    assert rows["exclusive"]["bytes"] == 0, "kernels read the manager's table as it is"
    assert rows["carve"]["bytes"] == pytest.approx(len(lengths) * 10 * 4 / 88), "ten more entries per 88 tokens"
    width = -(-max(lengths) // 88) * 11
    assert rows["broadcast"]["bytes"] == rows["loop"]["bytes"] == 4 * len(lengths) * width
    assert all(row["rel_error"] == 0 for row in rows.values())


def work_of(implementations, **sizes) -> Work:
    return Work(**{"sets": 1, "footprint": 1, "bytes": 10**6, "flops": 0, **sizes}, build=implementations)


def implementation(error=0.0, run=lambda i: None) -> Implementation:
    return Implementation(run, lambda: error)


def test_a_wrong_result_gives_no_time_and_hides_nothing():
    def broken() -> Implementation:
        raise ImportError("no such kernel")

    def crashes(i: int) -> None:
        raise RuntimeError("launch failed")

    builds = {
        "wrong": lambda: implementation(0.5),
        "nan": lambda: implementation(float("nan")),
        "absent": broken,
        "crashes": lambda: implementation(run=crashes),
        "fine": implementation,
    }
    case = Case("kv_store", (3,), TINY)
    rows = {row["impl"]: row for row in Bench(Setup.on(CPU), None).rows(case, lambda *_: work_of(builds))}
    assert list(rows) == list(builds)
    assert "wrong result" in rows["wrong"]["error"]
    assert "wrong result" in rows["nan"]["error"]
    assert rows["absent"]["error"] == "ImportError: no such kernel"
    assert rows["crashes"]["error"] == "RuntimeError: launch failed"
    assert all(rows[name]["median_ms"] is None for name in builds if name != "fine")
    assert rows["fine"]["error"] is None


def test_work_that_cannot_be_built_is_one_row():
    def build(case: Case, setup: Setup) -> Work:
        raise MemoryError("too large")

    case = Case("kv_store", (3,), TINY)
    (row,) = Bench(Setup.on(CPU), None).rows(case, build)
    assert (row["op"], row["impl"], row["error"]) == ("kv_store", "all", "MemoryError: too large")


def test_l2_is_named_by_what_the_sets_allow():
    bench = Bench(Setup(torch.device("cuda"), 0, l2_bytes=50), None)
    case = Case("gdn_decode", (1,), TINY, warm_sets=4)
    orders = dict(bench.orders(case, work_of({}, sets=20, footprint=10)))
    assert orders["warm"] == [0, 1, 2, 3] * 4, "four sets of 10 bytes stay in a cache of 50"
    assert orders["cold"] == list(range(20))
    assert [name for name, _ in bench.orders(case, work_of({}, sets=9, footprint=10))] == ["warm"]
    assert dict(bench.orders(case, work_of({}, sets=1, footprint=1000))) == {"cold": [0] * 4}
    assert list(Bench(Setup.on(CPU), None).orders(case, work_of({}))) == [(None, [0])]


def test_sets_evict_the_cache():
    setup = Setup(torch.device("cuda"), 0, l2_bytes=50)
    assert setup.sets(10, least=1, most=100) * 10 >= 3 * 50
    assert setup.sets(10, least=1, most=12) == 12
    assert setup.sets(1000, least=16, most=100) == 16
    assert Setup.on(CPU).sets(10, least=16, most=100) == 1


def test_fraction_is_of_the_binding_ceiling():
    ceilings = Ceilings(copy_bytes=1e12, matmul_flops=1e14, to_host_bytes=1e10, from_host_bytes=2e10)
    assert fraction(work_of({}, bytes=10**9), 2e-3, ceilings) == (pytest.approx(0.5), "copy")
    assert fraction(work_of({}, bytes=10**9, flops=10**12), 2e-2, ceilings) == (pytest.approx(0.5), "matmul")
    assert fraction(work_of({}, bytes=10**9, link="to_host"), 0.2, ceilings) == (pytest.approx(0.5), "to_host")


def test_timing_summary():
    timing = summary([8.0, 10.0, 12.0], launches=2, clock="graph")
    assert timing.median_ms == 5.0
    assert timing.spread == pytest.approx(0.36)
    slept = time_host([lambda: time.sleep(2e-3)])
    assert 2.0 <= slept.median_ms < 500.0  # milliseconds, also on a busy machine
    assert slept.repeats >= 5


# -- isolation ---------------------------------------------------------------------------------------------------------


def test_a_crash_or_a_hang_costs_only_itself():
    items = ["a", "raises", "b", "dies", "hangs", "c"]
    rows = list(isolated(deeds, items, lambda item, text: {"item": item, "error": text}, limit_s=3.0))
    by_item = {item: [row for row in rows if row["item"] == item] for item in items}
    for item in ("a", "b", "c"):
        assert [row.get("second", False) for row in by_item[item]] == [False, True]
    assert by_item["raises"][1]["error"] == "ValueError: as told"
    assert by_item["dies"][1]["error"] == "its process ended with status 7"
    assert by_item["hangs"][1]["error"] == "stopped: no answer within 3 s"
    assert os.getpid() not in {row.get("process") for row in rows}


def test_an_isolated_case_gives_the_same_columns():
    case = Case("block_copy", (1,) * 4, TINY, "uint8")
    bench = Bench(Setup.on(CPU), None)
    (row,) = isolated(bench.rows, [case], measure.failed, limit_s=SUBPROCESS_S)
    assert tuple(row) == COLUMNS
    assert row["error"] is None


def test_what_fails_to_compile_in_parallel_is_named():
    assert in_parallel(refuse_odd, [2, 3, 4], workers=2) == ["3: ValueError: 3 is odd"]
    assert in_parallel(refuse_odd, []) == []


@pytest.mark.parametrize("case", list(fast_cuda_cases()), ids=lambda case: case.operation)
def test_what_is_compiled_beforehand_is_small_and_of_the_same_kind(case):
    short = case.short()
    assert max(short.lengths) <= 300
    assert len(short.lengths) == (len(case.lengths) if case.operation == "paged_decode" else min(2, len(case.lengths)))
    kind = ("operation", "dtype", "kernel_block", "kernel_blocks", "layout", "checkpoint", "dims")
    assert [getattr(short, name) for name in kind] == [getattr(case, name) for name in kind]


def test_everything_of_a_case_is_launched_once_whatever_fails():
    launched = []

    def broken() -> Implementation:
        raise ImportError("no such kernel")

    work_of({"broken": broken, "fine": lambda: implementation(run=launched.append)}).launch_all()
    assert launched == [0]


# -- peers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fla(monkeypatch) -> ModuleType:
    """A stand-in that computes from exactly the arguments that fla-core documents, in its layouts."""
    module = ModuleType("fla.ops.gated_delta_rule")

    def operation(q, k, v, g, beta, *, initial_state, output_final_state, use_qk_l2norm_in_kernel):
        assert use_qk_l2norm_in_kernel
        assert output_final_state
        assert q.shape == k.shape == v.shape
        assert g.shape == beta.shape == q.shape[:3]
        assert (g <= 0).all(), "the decay is given as a logarithm"
        assert initial_state.shape == (q.shape[0], *q.shape[2:], v.shape[-1])
        return peers.delta_rule(q, k, v, g, beta, initial_state).to(q.dtype), initial_state

    module.chunk_gated_delta_rule = module.fused_recurrent_gated_delta_rule = operation
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        found = module if name.endswith("rule") else ModuleType(name)
        found.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, found)
    return module


def test_fla_gets_its_arguments(fla, seed):
    setup = Setup.on(CPU, seed)
    decode = peers.fla(TINY, rows=3, tokens=1, state_dtype="float32", sets=2, setup=setup)
    assert decode.run(1).shape == (3, 1, TINY.v_heads, TINY.state_dim)
    assert decode.error() <= measure.TOLERANCE
    prefill = peers.fla(TINY, rows=2, tokens=70, state_dtype="float32", sets=1, setup=setup)
    assert prefill.run(0).shape == (2, 70, TINY.v_heads, TINY.state_dim)
    assert prefill.error() <= measure.TOLERANCE
    assert peers.state("fla") == "installed"


def test_absent_peers_are_named(monkeypatch):
    for name in ("fla", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    for text in peers.states().values():
        assert text.startswith("not measured: ")


def test_the_delta_rule_agrees_with_the_decode_reference(seed):
    """``peers.delta_rule`` against ``gdn_decode.naive.step`` whose conv passes the current token on."""
    from hybridcache.kernels.gdn_decode import naive
    from hybridcache.kernels.testing import rel_error

    generator = torch.Generator().manual_seed(seed)
    heads, dim = 3, 8
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x_TC, state, a_TV, b_TV = draw(5, 3 * heads * dim), draw(heads, dim, dim), draw(5, heads), draw(5, heads)
    weight = torch.zeros(3 * heads * dim, 2, dtype=torch.float64)
    weight[:, 1] = 1.0
    ring, expected, now = torch.zeros(2, 3 * heads * dim, dtype=torch.float64), [], state
    a_log, dt_bias = draw(heads), draw(heads)
    for t in range(5):
        out, now = naive.step(now, ring, x_TC[t], weight, a_TV[t], b_TV[t], a_log, dt_bias, t)
        expected.append(out)
    q, k, v = torch.nn.functional.silu(x_TC).view(5, 3, heads, dim).unbind(1)
    g = -a_log.exp() * torch.nn.functional.softplus(a_TV + dt_bias)
    inputs = [x.unsqueeze(0) for x in (q, k, v, g, b_TV.sigmoid(), state)]
    assert rel_error(peers.delta_rule(*inputs)[0], torch.stack(expected)) < 1e-12


# -- tables of kernel blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 11, 66])
def test_both_ways_of_expansion_agree(n, seed):
    generator = np.random.default_rng(seed)
    ids_BN = generator.integers(0, 1 << 20, (5, 7), dtype=np.int32)
    expected = np.array([[entry * n + j for entry in row for j in range(n)] for row in ids_BN.tolist()])
    for way in ("loop", "broadcast"):
        staging = np.full((5, 7 * n), -7, dtype=np.int32)
        WAYS[way](ids_BN, n, staging)
        assert np.array_equal(staging, expected), way


def test_bytes_of_a_table():
    generator = np.random.default_rng(0)
    for way in WAYS:
        seconds, num_bytes = measure_table(way, 3, 1057, 1056, 16, generator)
        assert seconds > 0
        assert num_bytes == 3 * 132 * 4
        assert measure_table(way, 1, 88, 88, 8, generator)[1] == 11 * 4


# -- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "operation", ["gdn_decode", "paged_decode", "kv_store", "qk_norm_rope_store", "block_copy", "swap_out"]
)
def test_rows_on_cuda(operation, seed):
    case = next(case for case in fast_cuda_cases() if case.operation == operation)
    ceilings = Ceilings(copy_bytes=3e12, matmul_flops=7e14, to_host_bytes=5e10, from_host_bytes=5e10)
    rows = list(Bench(Setup.on(torch.device("cuda"), seed), ceilings).rows(case))
    assert rows
    for row in rows:
        assert row["error"] is None, row
        assert row["l2"] in ("warm", "cold")
        assert row["fraction"] > 0
