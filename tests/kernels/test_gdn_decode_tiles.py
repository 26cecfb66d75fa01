"""Which cut of GDN decode a batch gets."""

import logging

import pytest
import torch

from hybridcache.kernels.devices import warn_once
from hybridcache.kernels.gdn_decode import tiles
from hybridcache.kernels.gdn_decode.tiles import SharedTiles, Tiles, choose, default_tiles
from hybridcache.kernels.testing import state_case


def case_of(rows: int, state_dtype: str = "bfloat16", **shape):
    return state_case(torch.Generator(), positions=[-1] * rows, layers=1, state_dtype=state_dtype, **shape)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(tiles, "capability", lambda device: (9, 0))


@pytest.fixture(autouse=True)
def nothing_said():
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("state_dtype", "rows", "block_v"),
    [
        *(
            ("float32", rows, block_v)
            for rows, block_v in ((1, 32), (16, 32), (17, 64), (63, 64), (64, 128), (256, 128))
        ),
        *(
            ("bfloat16", rows, block_v)
            for rows, block_v in ((1, 32), (16, 32), (17, 64), (31, 64), (32, 128), (256, 128))
        ),
    ],
)
def test_measured_winners(state_dtype, rows, block_v):
    chosen = default_tiles(rows, getattr(torch, state_dtype))
    assert chosen.block_v == block_v
    assert chosen.dependent_launch
    assert isinstance(chosen, SharedTiles) == (block_v == 128)


def test_hopper_gets_the_default(on_hopper, caplog):
    case = case_of(32)
    assert choose(case.layout, case.x_BC) == default_tiles(32, torch.bfloat16)
    assert not caplog.records


def test_other_devices_stay_in_registers_and_say_why_once(caplog):
    case = case_of(32)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose(case.layout, case.x_BC) == Tiles(64, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "GDN decode keeps states in registers, not in shared memory: cpu: no compute capability of 9.0 or later"
    ]


def test_shapes_that_shared_memory_cannot_do_are_named(on_hopper, caplog):
    case = case_of(32, k_heads=1, v_heads=1, key_dim=96)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose(case.layout, case.x_BC) == Tiles(64, 2, dependent_launch=True)
    assert len(caplog.records) == 1
    assert "key dim 96" in caplog.text
