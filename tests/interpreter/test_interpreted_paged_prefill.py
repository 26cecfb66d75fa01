"""Paged prefill in Triton's interpreter against its float64 reference: chunks, tables, layouts and what is masked.

Pools are poisoned with NaN and tables shuffled; a failure prints its seed.
"""

import random

import pytest
import torch
from kernel_checks import run

from hybridcache.errors import UserError
from hybridcache.kernels.backend import Backend
from hybridcache.kernels.paged_prefill import naive, triton
from hybridcache.kernels.paged_prefill.tiles import Tiles, max_tiles
from hybridcache.kernels.testing import attention_case, cached, rel_error

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
TILE = Tiles(queries=64, keys=32, num_warps=4, num_stages=2)


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def chunks(generator, case, queries, heads, dtype="float32", tail=0):
    """The last ``queries[b]`` tokens of every row as a batch; ``tail`` tokens belong to no row."""
    offsets = torch.tensor([0, *queries]).cumsum(0).int()
    wide = torch.randn(int(offsets[-1]) + tail, 2 * heads, case.layout.k_dim, generator=generator)
    q_THD = wide[:, heads:].to(getattr(torch, dtype))
    lengths = (max(queries), int(case.context_len_B.max()))
    return (case.layout, 1, q_THD, case.kv_table_BN, offsets, case.context_len_B, case.layout.k_dim**-0.5, *lengths)


def assert_rows_equal(out, expected, offsets, tolerance):
    for row, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        if end > begin and expected[begin:end].any():
            assert rel_error(out[begin:end], expected[begin:end]) <= tolerance, f"row {row}"


LAYOUTS = [
    # order, kernel_block_tokens, kernel_blocks, kv_heads, k_dim, v_dim
    pytest.param("block_major", 8, 3, 2, 16, 16, id="block-kb8x3-K2-D16"),
    pytest.param("block_major", 4, 1, 1, 24, 40, id="block-kb4-K1-D24x40"),
    pytest.param("layer_major", 44, 1, 2, 32, 8, id="layer-kb44-K2-D32x8"),
]


@pytest.mark.parametrize(("order", "kb", "blocks", "kv_heads", "k_dim", "v_dim"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "group"), [("float32", 4), ("bfloat16", 1), ("bfloat16", 5)])
def test_whole_prompts_and_resumed_chunks(generator, order, kb, blocks, kv_heads, k_dim, v_dim, dtype, group):
    """Row 2 is padding, its length stale; rows 1 and 4 have no new tokens. Two tokens behind the last row get zeros."""
    lengths = [65, 9, 0, 64, 7, 130, 1]
    queries = [65, 0, 5, 3, 0, 63, 1]
    case = attention_case(
        generator,
        lengths=lengths,
        order=order,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
    )
    inputs = chunks(generator, case, queries, kv_heads * group, dtype, tail=2)
    expected = naive.paged_prefill(*cached(case.buffer, *inputs))
    out = triton.paged_prefill(*cached(case.buffer, *inputs), tiles=TILE)
    assert out.dtype == inputs[2].dtype
    assert (out[65:70] == 0).all()
    assert (out[-2:] == 0).all()
    assert_rows_equal(out, expected, inputs[4], TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_lengths_around_a_tile(generator, tokens):
    case = attention_case(generator, lengths=[tokens], kv_heads=1, k_dim=16, v_dim=16, dtype="float32", extra_entries=0)
    inputs = chunks(generator, case, [tokens], 2)
    expected = naive.paged_prefill(*cached(case.buffer, *inputs))
    tile = Tiles(queries=128, keys=64, num_warps=8, num_stages=2)
    out = triton.paged_prefill(*cached(case.buffer, *inputs), tiles=tile)
    for token in range(tokens):
        assert rel_error(out[token], expected[token]) <= 1e-5, f"token {token}"


def test_more_heads_than_a_tile_and_the_default_tile(generator):
    case = attention_case(generator, lengths=[40, 3], kv_heads=1, k_dim=16, v_dim=16, dtype="float32")
    inputs = chunks(generator, case, [9, 3], 72)
    expected = naive.paged_prefill(*cached(case.buffer, *inputs))
    assert rel_error(triton.paged_prefill(*cached(case.buffer, *inputs), tiles=TILE), expected) <= 1e-5
    assert rel_error(triton.paged_prefill(*cached(case.buffer, *inputs)), expected) <= 1e-5


def test_more_rows_than_one_step_of_the_search(generator):
    rows = triton.SEARCH_ROWS + 5
    lengths = torch.randint(0, 4, (rows,), generator=generator).tolist()
    lengths[-1] = 3
    case = attention_case(generator, lengths=lengths, kv_heads=1, k_dim=16, v_dim=16, dtype="float32", extra_entries=0)
    inputs = chunks(generator, case, lengths, 2)
    expected = naive.paged_prefill(*cached(case.buffer, *inputs))
    assert rel_error(triton.paged_prefill(*cached(case.buffer, *inputs), tiles=TILE), expected) <= 1e-5


def test_the_output_sees_its_keys_and_values(generator):
    """Poison in one row of a live request shows from that position on, for its KV head only, and in no other request."""
    case = attention_case(generator, lengths=[40, 40], kv_heads=2, k_dim=16, v_dim=16, dtype="float32")
    address = case.layout.address(1, int(case.kv_table_BN[1, 0]), 21, 1, 0)
    case.buffer[address : address + 64] = 0xFF
    out = triton.paged_prefill(*cached(case.buffer, *chunks(generator, case, [40, 40], 4)), tiles=TILE)
    assert out[:40].isfinite().all()
    assert out[40:, 2:].isfinite().all()
    assert out[61:, :2].isnan().all()


def test_refusals(generator):
    case = attention_case(generator, lengths=[4], kv_heads=1, k_dim=16, v_dim=16, dtype="float32")
    layout, layer, q_THD, table, offsets, context, scale, *lengths = chunks(generator, case, [4], 2)
    inputs = (layout, layer, q_THD.double(), table, offsets, context, scale, *lengths)
    with pytest.raises(UserError, match="float64"):
        run(Backend("triton"), "paged_prefill", case.buffer, *inputs)
    with pytest.raises(UserError, match="scale"):
        triton.paged_prefill(*cached(case.buffer, layout, layer, q_THD, table, offsets, context, -scale, *lengths))
    latent = attention_case(generator, lengths=[4], kv_heads=1, k_dim=16, v_dim=0, dtype="float32")
    with pytest.raises(UserError, match="v_dim=0"):
        triton.paged_prefill(
            *cached(latent.buffer, latent.layout, layer, q_THD, table, offsets, context, scale, *lengths)
        )


@pytest.mark.parametrize("rows", [1, 3, 128, 300])
def test_the_grid_covers_every_split(generator, rows):
    for _ in range(200):
        queries = torch.randint(0, 70, (rows,), generator=generator)
        tail = int(torch.randint(0, 70, (1,), generator=generator))
        tile_tokens = int(torch.randint(1, 40, (1,), generator=generator))
        need = sum(-(-length // tile_tokens) for length in [*queries.tolist(), tail])
        assert need <= max_tiles(int(queries.sum()) + tail, rows, tile_tokens)
