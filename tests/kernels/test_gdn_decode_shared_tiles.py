"""Which cuts GDN decode through shared memory offers, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from hybridcache.errors import UserError
from hybridcache.kernels.gdn_decode.tiles import SharedTiles, rows_at_once, why_not
from hybridcache.kernels.testing import state_case


@pytest.mark.parametrize(
    ("kwargs", "field"), [({"num_warps": 3}, "num_warps"), ({"block_v": 48}, "block_v"), ({"chunks": 0}, "chunks")]
)
def test_impossible_tiles_are_refused(kwargs, field):
    with pytest.raises(UserError, match=field):
        SharedTiles(**{"block_v": 64, "num_warps": 4, **kwargs})


@pytest.mark.parametrize(
    ("tiles", "shape", "reason"),
    [
        (SharedTiles(128, 4), {}, None),
        (SharedTiles(128, 4, chunks=1), {}, None),
        (SharedTiles(4, 1), {}, "shorter than a copy"),
        (SharedTiles(64, 4), {"key_dim": 96, "value_dim": 128}, "powers of two"),
        (SharedTiles(64, 4), {"width": 3}, "powers of two"),
        (SharedTiles(64, 4), {"value_dim": 96}, "no multiple"),
        (SharedTiles(128, 8, chunks=32), {}, "chunks"),
        (SharedTiles(128, 4), {"dtype": "float64"}, "float32"),
        (SharedTiles(128, 4), {"state_dtype": "float64"}, "float32"),
    ],
)
def test_what_shared_tiles_can_do(tiles, shape, reason):
    heads = {"k_heads": 2, "v_heads": 4}
    case = state_case(torch.Generator(), positions=[-1], layers=1, **{"state_dtype": "bfloat16", **heads, **shape})
    found = why_not(case.layout, case.x_BC.dtype, tiles)
    assert found is None if reason is None else reason in found


def test_states_must_be_aligned_to_copies():
    case = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype="bfloat16")
    for shifted in (replace(case.layout, base=(8,)), replace(case.layout, stride=case.layout.stride + 8)):
        assert "aligned" in why_not(shifted, case.x_BC.dtype, SharedTiles(128, 4))


def test_rows_at_once():
    assert rows_at_once(SharedTiles(128, 4), 2) == 8
    assert rows_at_once(SharedTiles(128, 4), 4) == 4
    assert rows_at_once(SharedTiles(32, 1), 2) == 8
