"""All tiles of GDN decode compute the same step, with the conv weight in either order."""

import random

import pytest
import torch
from kernel_checks import state_error

from hybridcache.errors import UserError
from hybridcache.kernels.gdn_decode import naive
from hybridcache.kernels.gdn_decode.tiles import Tiles
from hybridcache.kernels.gdn_decode.triton import gdn_decode
from hybridcache.kernels.testing import cached, rel_error, state_case


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("weight_by_column", [False, True], ids=["CW", "WC"])
@pytest.mark.parametrize("conv_first", [False, True], ids=["state-first", "conv-first"])
@pytest.mark.parametrize("block_v", [4, 8, 64])
def test_tiles_agree(generator, block_v, conv_first, weight_by_column):
    """Tiles that divide the value dims and tiles that do not."""
    case = state_case(
        generator,
        positions=[0, -1, 2, 77],
        k_heads=2,
        v_heads=4,
        key_dim=12,
        value_dim=20,
        dtype="float32",
        conv_dtype="float32",
    )
    if weight_by_column:
        case.conv_weight_CW = case.conv_weight_CW.t().contiguous().t()
    expected_buffer = case.buffer.clone()
    expected = naive.gdn_decode(*cached(expected_buffer, *case.step(1)))
    tiles = Tiles(block_v, num_warps=2, evict_first=True, max_registers=128, conv_first=conv_first)
    assert rel_error(gdn_decode(*cached(case.buffer, *case.step(1)), tiles=tiles), expected) <= 1e-5
    assert state_error(case, expected_buffer, 1) <= 1e-5


@pytest.mark.parametrize(
    ("block_v", "num_warps", "field"), [(12, 1, "block_v"), (2, 1, "block_v"), (8, 3, "num_warps")]
)
def test_impossible_tiles_are_refused(block_v, num_warps, field):
    with pytest.raises(UserError, match=field):
        Tiles(block_v, num_warps)
