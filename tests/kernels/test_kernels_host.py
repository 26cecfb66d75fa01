"""What the Triton launchers decide on the host: splits, batches of independent copies, the copy's unit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernel_checks import run

from hybridcache.errors import UserError
from hybridcache.kernels.backend import Backend
from hybridcache.kernels.block_copy.triton import MAX_MOVES, independent_batches, unit
from hybridcache.kernels.gdn_prefill.testing import prefill_case
from hybridcache.kernels.paged_decode.tiles import (
    MAX_SPLITS,
    MIN_FILL,
    Tiles,
    choose_splits,
    choose_tiles,
    head_programs,
    head_tile,
)
from hybridcache.kernels.testing import attention_case


@given(st.integers(1, 10_000), st.integers(1, 1 << 20), st.integers(1, 200), st.integers(1, 8))
def test_splits_stay_within_their_bounds_and_one_wave(programs, max_tokens, multiprocessors, programs_per_sm):
    tiles = Tiles(16, 4, 3, programs_per_sm)
    splits = choose_splits(programs, max_tokens, multiprocessors, tiles)
    assert 1 <= splits <= MAX_SPLITS
    assert (splits - 1) * tiles.keys < max_tokens
    assert splits == 1 or programs * splits <= programs_per_sm * multiprocessors


def qwen3_next_layout():
    return attention_case(torch.Generator(), lengths=[0], layers=1).layout


@pytest.mark.parametrize(
    ("rows", "tokens", "keys", "splits"),
    [
        (1, 32_768, 64, 66),
        (16, 4_096, 64, 4),
        (64, 8_192, 64, 1),
        (256, 2_048, 16, 1),
        (1, 88, 64, 2),
        (35, 4_096, 16, 7),
    ],
)
def test_decode_of_qwen3_next_on_132_multiprocessors(rows, tokens, keys, splits):
    tiles = choose_tiles(qwen3_next_layout(), 16, torch.bfloat16, 2 * rows, 132)
    assert tiles.keys == keys
    assert choose_splits(2 * rows, tokens, 132, tiles) == splits


@given(st.integers(1, 2_000), st.sampled_from([1, 16, 108, 132, 144]))
def test_large_tiles_need_full_multiprocessors(programs, multiprocessors):
    tiles = choose_tiles(qwen3_next_layout(), 16, torch.bfloat16, programs, multiprocessors)
    splits = choose_splits(programs, 1 << 20, multiprocessors, tiles)
    if tiles.programs_per_sm == 1 and splits < MAX_SPLITS:
        assert MIN_FILL * multiprocessors <= programs * splits <= multiprocessors


@pytest.mark.parametrize(("heads", "dtype", "tile"), [(16, "bfloat16", 16), (48, "float16", 32), (200, "bfloat16", 64)])
def test_heads_of_a_program(heads, dtype, tile):
    assert head_tile(qwen3_next_layout(), heads, getattr(torch, dtype)) == tile
    assert head_tile(qwen3_next_layout(), heads, torch.float32) == 16


@pytest.mark.parametrize(
    ("heads", "dtype", "programs"), [(16, "bfloat16", 2), (200, "bfloat16", 4), (72, "float32", 6)]
)
def test_programs_of_a_row(heads, dtype, programs):
    assert head_programs(qwen3_next_layout(), heads, getattr(torch, dtype)) == programs


MOVES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12)).filter(lambda m: abs(m[0] - m[1]) >= m[2]),
    max_size=25,
)


@given(MOVES, st.randoms())
def test_moves_of_a_batch_may_run_in_any_order(moves, rng):
    batches = independent_batches(moves)
    assert [move for batch in batches for move in batch] == moves
    one_by_one, batched = bytearray(range(64)), bytearray(range(64))
    for src, dst, size in moves:
        one_by_one[dst : dst + size] = one_by_one[src : src + size]
    for batch in batches:
        rng.shuffle(batch)
        for src, dst, size in batch:
            batched[dst : dst + size] = batched[src : src + size]
    assert batched == one_by_one


def test_independent_moves_share_a_launch():
    scattered = [(i * 64, 10_000 + i * 128, 64) for i in range(50)]
    assert independent_batches(scattered) == [scattered]
    chain = [
        (64 * (i + 1), 64 * i, 64) for i in range(4)
    ]  # compaction by one block: each overwrites what was just read
    assert len(independent_batches(chain)) == 4
    assert independent_batches([]) == []
    many = [(0, 100 + i, 1) for i in range(MAX_MOVES + 1)]
    assert [len(batch) for batch in independent_batches(many)] == [MAX_MOVES, 1]


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([(0, 32, 16)], 16),
        ([(0, 4096, 4096)], 16),
        ([(0, 32, 16), (8, 32, 16)], 8),
        ([(2, 4, 2)], 2),
        ([(0, 16, 3)], 1),
    ],
)
def test_unit_divides_every_address_and_length(moves, expected):
    assert unit(moves) == expected


def test_float64_is_refused_and_told_where_to_go():
    backend, generator = Backend("triton"), torch.Generator().manual_seed(0)
    small = {"k_heads": 1, "v_heads": 2, "key_dim": 8, "value_dim": 8}
    state = prefill_case(generator, lengths=[3], starts=[0], dtype="float64", conv_dtype="float64", **small)
    with pytest.raises(UserError, match=r"dtype='float64': gdn_prefill .*backend=torch"):
        run(backend, "gdn_prefill", state.buffer, *state.step(0))
    case = attention_case(generator, lengths=[3], kv_heads=1, k_dim=16, v_dim=16, dtype="float64")
    q = torch.zeros(3, 2, 16, dtype=torch.float64)
    at = (case.buffer, case.layout, 0)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(UserError, match=r"dtype='float64': paged_prefill .*backend=torch"):
        run(backend, "paged_prefill", *at, q, case.kv_table_BN, cu_seqlens, case.context_len_B, 0.25, 3, 3)
    with pytest.raises(UserError, match=r"dtype='float64': paged_decode .*backend=torch"):
        run(backend, "paged_decode", *at, q[:1], case.kv_table_BN, case.context_len_B, 0.25)
    assert not backend.launches
