"""GDN kernels on a GPU with states read through one table and written through another: Triton and Gluon, every cut that a batch
size chooses, at Qwen3-Next's shape."""

import random
from functools import partial

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from kernel_checks import block_errors, reference64, run, state_error
    from state_tables import LAYER, check_checkpoints, check_equal_tables, check_moves, check_shared_source

    from hybridcache.kernels.backend import Backend
    from hybridcache.kernels.gdn_decode import naive as naive_decode
    from hybridcache.kernels.gdn_decode.tiles import default_tiles
    from hybridcache.kernels.gdn_decode.triton import gdn_decode
    from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
    from hybridcache.kernels.gdn_prefill.triton import gdn_prefill
    from hybridcache.kernels.testing import cached, rel_error, state_case

BATCHES = [1, 8, 64]
"""Each chooses another cut of GDN decode."""


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def positions(generator: torch.Generator, rows: int) -> list[int]:
    """Mostly far on; some at the start, where columns are not seen yet; padding among them where there is room."""
    far = torch.randint(1, 5000, (rows,), generator=generator).tolist()
    return [0, -1, 1, 2, 3, *far][:rows] if rows > 5 else far


@pytest.mark.parametrize("cut", BATCHES)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_decode_moves_the_whole_state(generator, state_dtype, cut):
    """By the cut of each batch size, on 64 rows."""
    tiles = default_tiles(cut, getattr(torch, state_dtype))
    case = state_case(generator, positions=positions(generator, 64), apart=True, state_dtype=state_dtype, device="cuda")
    check_moves(partial(gdn_decode, tiles=tiles), case)


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_decode_apart_is_the_reference(generator, state_dtype, rows):
    case = state_case(
        generator, positions=positions(generator, rows), apart=True, state_dtype=state_dtype, device="cuda"
    )
    expected_buffer, backend = case.buffer.clone(), Backend("triton")
    expected = naive_decode.gdn_decode(*cached(expected_buffer, *case.step(LAYER)))
    assert rel_error(run(backend, "gdn_decode", case.buffer, *case.step(LAYER)), expected) <= 1e-2
    assert state_error(case, expected_buffer, LAYER) <= (1e-5 if state_dtype == "float32" else 1e-2)
    assert sum(backend.launches.values()) == 1
    assert not any("torch" in name for name in backend.launches)


@pytest.mark.parametrize("rows", BATCHES)
def test_decode_with_equal_tables_and_shared_sources(generator, rows):
    check_equal_tables(gdn_decode, state_case(generator, positions=positions(generator, rows), device="cuda"))
    check_shared_source(gdn_decode, state_case(generator, positions=[700] * rows, apart=True, device="cuda"))


@pytest.mark.parametrize("hopper", [False, True], ids=["triton", "as-chosen"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_prefill_moves_the_whole_state(generator, state_dtype, hopper):
    lengths, starts = [65, 1, 2, 700, 3, 128], [63, 64, -1, 100, 1, 0]
    options = {"apart": True, "tail": 9, "state_dtype": state_dtype, "device": "cuda"}
    case = prefill_case(generator, lengths=lengths, starts=starts, **options)
    check_moves(prefill(case, hopper), case)


def prefill(case, hopper: bool):
    """GDN prefill by the tiles that the device chooses, or by those of Triton's kernel."""
    from dataclasses import replace

    from hybridcache.kernels.gdn_prefill.tiles import choose

    tiles = choose(case.state.layout, case.x_TC, case.start_B.shape[0])
    return partial(gdn_prefill, tiles=tiles if hopper else replace(tiles, hopper=False))


@pytest.mark.parametrize("hopper", [False, True], ids=["triton", "as-chosen"])
@pytest.mark.parametrize("interval", [64, 256])
def test_a_checkpoint_is_a_complete_state(generator, interval, hopper):
    options = {"apart": True, "spare": 40, "device": "cuda"}
    case = prefill_case(generator, lengths=[300, 600, 100], starts=[62, 0, 1024], **options)
    check_checkpoints(prefill(case, hopper), case, checkpoint_table(case, LAYER, interval), interval)


@pytest.mark.parametrize("apart", [False, True])
def test_checkpoints_through_the_backend_are_the_reference(generator, apart):
    options = {"apart": apart, "spare": 40, "device": "cuda"}
    case = prefill_case(generator, lengths=[300, 600, 100], starts=[62, 0, -1], tail=3, **options)
    table_BNL = checkpoint_table(case, LAYER, 128, spare=1)
    expected_buffer = case.buffer.clone()
    expected = reference64(*cached(expected_buffer, *case.step(LAYER)), table_BNL, 128)
    out = run(Backend("triton"), "gdn_prefill", case.buffer, *case.step(LAYER), table_BNL, 128)
    assert rel_error(out[:900], expected[:900]) <= 1e-2
    kept = [*table_BNL[0, :2, LAYER].tolist(), *table_BNL[1, :4, LAYER].tolist()]
    for entries in (None, kept):
        error, rings = block_errors(case, expected_buffer, LAYER, entries)
        assert error <= 1e-2
        assert rings
    assert torch.equal(case.buffer, expected_buffer)


def test_prefill_with_equal_tables_and_shared_sources(generator):
    check_equal_tables(gdn_prefill, prefill_case(generator, lengths=[130, 1], starts=[9, 0], device="cuda"))
    options = {"apart": True, "device": "cuda"}
    check_shared_source(gdn_prefill, prefill_case(generator, lengths=[130, 1, 64], starts=[640] * 3, **options))


def test_a_graph_moves_states_where_its_tables_say(generator):
    """One captured decode step, replayed with tables that changed in between."""
    case = state_case(generator, positions=[50] * 8, apart=True, device="cuda")
    backend, still = Backend("triton"), case.buffer.clone()
    cache = backend.bind_layer(case.buffer, case.layout, LAYER)
    _, _, *inputs = case.step(LAYER)
    first = case.buffer.clone()
    cache.gdn_decode(*inputs)  # compiles
    case.buffer.copy_(first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.gdn_decode(*inputs)
    assert torch.equal(case.buffer, first), "capture must not run"
    for _ in range(3):
        expected = gdn_decode(*cached(still, *case.step(LAYER)))
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(case.buffer, still)
        read_BL = case.state_read_BL.clone()
        case.state_read_BL.copy_(case.state_write_BL)
        case.state_write_BL.copy_(read_BL)
        case.position_B += 1
