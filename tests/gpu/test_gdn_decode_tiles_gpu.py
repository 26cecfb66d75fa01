"""Every kind of tiles of GDN decode on CUDA, at the shape of Qwen3-Next, against the float64 reference."""

import random
from dataclasses import replace

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from kernel_checks import state_error

    from hybridcache.kernels.gdn_decode import naive
    from hybridcache.kernels.gdn_decode.tiles import SHARED_ROWS, SharedTiles, Tiles, choose
    from hybridcache.kernels.gdn_decode.triton import gdn_decode
    from hybridcache.kernels.testing import cached, rel_error, state_case

    CUTS = {
        "v8-w1": Tiles(8, 1),
        "v16-w1-dependent": Tiles(16, 1, dependent_launch=True),
        "v32-w1": Tiles(32, 1),
        "v32-w1-first": Tiles(32, 1, conv_first=True),
        "v32-w2-evict": Tiles(32, 2, evict_first=True),
        "v64-w2": Tiles(64, 2),
        "v64-w2-first-evict": Tiles(64, 2, conv_first=True, evict_first=True),
        "v128-w4-r200": Tiles(128, 4, max_registers=200),
        "shared-v128-w4-c1": SharedTiles(128, 4, chunks=1),
        "shared-v128-w4": SharedTiles(128, 4),
        "shared-v128-w4-c8-evict": SharedTiles(128, 4, chunks=8, evict_first=True),
        "shared-v64-w4-c1": SharedTiles(64, 4, chunks=1),
        "shared-v64-w2-c1": SharedTiles(64, 2, chunks=1),
        "shared-v32-w1-dependent": SharedTiles(32, 1, dependent_launch=True),
    }
else:
    CUTS = {}


@pytest.mark.parametrize("weight_by_column", [False, True], ids=["CW", "WC"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["block_major", "layer_major"])
@pytest.mark.parametrize("name", CUTS)
def test_tiles_agree(name, order, state_dtype, weight_by_column):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    case = state_case(generator, positions=[0, 1, -1, 3, 4711], order=order, state_dtype=state_dtype, device="cuda")
    if weight_by_column:
        case.conv_weight_CW = case.conv_weight_CW.t().contiguous().t()
    for step in range(3):
        expected_buffer = case.buffer.clone()
        expected = naive.gdn_decode(*cached(expected_buffer, *case.step(1)))
        out = gdn_decode(*cached(case.buffer, *case.step(1)), tiles=CUTS[name])
        assert rel_error(out, expected) <= 1e-2, f"step {step}"
        after = case.buffer.clone()
        assert state_error(case, expected_buffer, 1) <= (1e-5 if state_dtype == "float32" else 1e-2), f"step {step}"
        case.buffer.copy_(after)
        case.position_B += 1


@pytest.mark.parametrize("name", ["v64-w2", "v32-w1-first", "shared-v128-w4-c1"])
def test_dependent_launches_wait_for_each_other(name):
    """A chain of steps on the same states, each launch set up before the one ahead of it has ended."""
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(1 << 31))
    case = state_case(generator, positions=[7] * 64, device="cuda")
    results = []
    for dependent in (True, False):
        buffer, cut = case.buffer.clone(), replace(CUTS[name], dependent_launch=dependent)
        steps = [(*case.step(0)[:-1], case.position_B + step) for step in range(20)]
        results.append(([gdn_decode(*cached(buffer, *step), tiles=cut) for step in steps], buffer))
    (chained, chained_buffer), (alone, alone_buffer) = results
    assert all(torch.equal(first, second) for first, second in zip(chained, alone))
    assert torch.equal(chained_buffer, alone_buffer)


@pytest.mark.parametrize("name", ["shared-v128-w4", "shared-v128-w4-c1", "shared-v64-w4-c1"])
def test_shared_memory_is_not_read_before_its_copy_arrives(name):
    """Many programs, repeated on the same bytes: a moving result is a race."""
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(1 << 31))
    case = state_case(generator, positions=[9] * 96, layers=1, state_dtype="bfloat16", device="cuda")
    results = []
    for _ in range(10):
        buffer = case.buffer.clone()
        results.append((gdn_decode(*cached(buffer, *case.step(0)), tiles=CUTS[name]), buffer))
    for out, buffer in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(buffer, results[0][1])


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 32, 64])
def test_the_choice_for_a_batch(rows, state_dtype):
    """With padding rows and a row of position 0; the weight comes as the view that a model which stores ``[W, C]`` gives."""
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(1 << 31))
    positions = [(5, 0, 1234, -1)[row % 4] for row in range(rows)]
    case = state_case(generator, positions=positions, state_dtype=state_dtype, device="cuda")
    case.conv_weight_CW = case.conv_weight_CW.t().contiguous().t()
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    staged = rows >= SHARED_ROWS[4 if state_dtype == "float32" else 2]
    assert isinstance(choose(case.layout, case.x_BC), SharedTiles) == (hopper and staged)
    expected_buffer = case.buffer.clone()
    expected = naive.gdn_decode(*cached(expected_buffer, *case.step(1)))
    assert rel_error(gdn_decode(*cached(case.buffer, *case.step(1))), expected) <= 1e-2
    assert state_error(case, expected_buffer, 1) <= (1e-5 if state_dtype == "float32" else 1e-2)
