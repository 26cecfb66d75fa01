"""Every Triton kernel against its float64 reference, on tiny shapes in Triton's interpreter.

Pools are poisoned and tables shuffled; a failure names its seed in the test's id or message.
"""

import random

import numpy as np
import pytest
import torch
import triton
from kernel_checks import run, state_error
from packaging.version import Version

from hybridcache.errors import UserError
from hybridcache.kernels.backend import Backend
from hybridcache.kernels.block_copy import naive as naive_copy
from hybridcache.kernels.block_copy import triton as triton_copy
from hybridcache.kernels.gdn_decode import naive as naive_gdn
from hybridcache.kernels.gdn_decode import triton as triton_gdn
from hybridcache.kernels.kv_store import naive as naive_store
from hybridcache.kernels.kv_store import triton as triton_store
from hybridcache.kernels.paged_decode import naive as naive_decode
from hybridcache.kernels.paged_decode import triton as triton_decode
from hybridcache.kernels.paged_decode.tiles import Tiles
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.testing import attention_case, cached, poisoned, rel_error, state_case

device_loop_bounds = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="Triton 3.6's interpreter takes no tensor as a loop bound under NumPy >= 2.4",
)
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def test_kernels_are_interpreted():
    assert interpreting()


# -- GDN decode ----------------------------------------------------------------------------------------------------------

GDN_SHAPES = [
    # k_heads, v_heads, key_dim, value_dim, width
    pytest.param(2, 4, 16, 16, 4, id="K2-V4-16x16-W4"),
    pytest.param(1, 3, 12, 40, 3, id="K1-V3-12x40-W3"),
    pytest.param(3, 3, 8, 20, 2, id="K3-V3-8x20-W2"),
    pytest.param(2, 2, 24, 8, 5, id="K2-V2-24x8-W5"),
]


@pytest.mark.parametrize(("k_heads", "v_heads", "key_dim", "value_dim", "width"), GDN_SHAPES)
@pytest.mark.parametrize(
    ("order", "dtype", "state_dtype", "conv_dtype"),
    [
        ("block_major", "float32", "float32", "float32"),
        ("layer_major", "bfloat16", "bfloat16", "bfloat16"),
        ("layer_major", "float64", "float64", "float64"),
    ],
)
def test_gdn_decode(generator, k_heads, v_heads, key_dim, value_dim, width, order, dtype, state_dtype, conv_dtype):
    case = state_case(
        generator,
        positions=[0, -1, 1, width - 1, 1000],
        order=order,
        k_heads=k_heads,
        v_heads=v_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        width=width,
        dtype=dtype,
        state_dtype=state_dtype,
        conv_dtype=conv_dtype,
    )
    expected_buffer = case.buffer.clone()
    expected = naive_gdn.gdn_decode(*cached(expected_buffer, *case.step(1)))
    out = triton_gdn.gdn_decode(*cached(case.buffer, *case.step(1)))
    assert out.dtype == case.x_BC.dtype
    assert rel_error(out, expected) <= TOLERANCE[dtype]
    assert state_error(case, expected_buffer, 1) <= TOLERANCE[state_dtype]


def test_gdn_decode_over_many_steps_keeps_the_ring_right(generator):
    """From position 0 in poisoned memory, more steps than the ring has columns, with inputs that are slices."""
    case = state_case(
        generator, positions=[0, 0], k_heads=1, v_heads=2, key_dim=8, value_dim=8, dtype="float32", conv_dtype="float32"
    )
    expected_buffer = case.buffer.clone()
    rows, channels = case.x_BC.shape
    for _ in range(9):
        case.x_BC = torch.randn(rows, channels + 3, generator=generator)[:, 1 : channels + 1]
        case.a_BV, case.b_BV = torch.randn(rows, 4, generator=generator).split(2, dim=1)
        expected = naive_gdn.gdn_decode(*cached(expected_buffer, *case.step(1)))
        out = triton_gdn.gdn_decode(*cached(case.buffer, *case.step(1)))
        assert rel_error(out, expected) <= 1e-5
        case.position_B += 1


# -- KV store ------------------------------------------------------------------------------------------------------------

KV_LAYOUTS = [
    # order, kernel_block_tokens, kernel_blocks, kv_heads, k_dim, v_dim
    pytest.param("block_major", 8, 3, 2, 16, 16, id="block-kb8x3-K2-D16"),
    pytest.param("block_major", 4, 1, 1, 24, 40, id="block-kb4-K1-D24x40"),
    pytest.param("layer_major", 12, 1, 3, 16, 16, id="layer-kb12-K3-D16"),
    pytest.param("layer_major", 16, 2, 2, 32, 8, id="layer-kb16x2-K2-D32x8"),
]


@pytest.mark.parametrize(("order", "kb", "blocks", "kv_heads", "k_dim", "v_dim"), KV_LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_store(generator, order, kb, blocks, kv_heads, k_dim, v_dim, dtype):
    lengths = [1, 0, 2 * kb * blocks + 3, 37]
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
    case.buffer.fill_(0xFF)
    tokens = [(row, position) for row, length in enumerate(lengths) for position in range(length)]
    tokens.insert(3, (1, 10**6))  # a padding row, its position stale and far beyond the table
    row_T = torch.tensor([row for row, _ in tokens], dtype=torch.int32)
    position_T = torch.tensor([position for _, position in tokens])
    # In the cache's own type: the interpreter casts to bfloat16 by cutting bits off, where a GPU rounds.
    k_TKD = torch.randn(len(tokens), 2 * kv_heads, k_dim, generator=generator)[:, kv_heads:].to(getattr(torch, dtype))
    v_TKD = torch.randn(len(tokens), kv_heads, v_dim, generator=generator).to(getattr(torch, dtype))
    expected_buffer = case.buffer.clone()
    inputs = (case.layout, 1, k_TKD, v_TKD, case.kv_table_BN, row_T, position_T)
    naive_store.kv_store(*cached(expected_buffer, *inputs))
    triton_store.kv_store(*cached(case.buffer, *inputs))
    assert torch.equal(case.buffer, expected_buffer)
    assert (case.buffer != 0xFF).any()


def test_kv_store_of_a_latent_without_values(generator):
    case = attention_case(generator, lengths=[9], kv_heads=1, k_dim=24, v_dim=0, dtype="float32")
    case.buffer.fill_(0xFF)
    expected_buffer = case.buffer.clone()
    k_TKD = torch.randn(9, 1, 24, generator=generator)
    inputs = (
        case.layout,
        0,
        k_TKD,
        k_TKD[:, :, :0],
        case.kv_table_BN,
        torch.zeros(9, dtype=torch.int32),
        torch.arange(9),
    )
    naive_store.kv_store(*cached(expected_buffer, *inputs))
    triton_store.kv_store(*cached(case.buffer, *inputs))
    assert torch.equal(case.buffer, expected_buffer)


# -- Paged decode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "kb", "blocks", "kv_heads", "k_dim", "v_dim"), KV_LAYOUTS)
@device_loop_bounds
@pytest.mark.parametrize(("dtype", "group", "splits"), [("float32", 4, 3), ("bfloat16", 1, 1), ("bfloat16", 20, 2)])
def test_paged_decode(generator, order, kb, blocks, kv_heads, k_dim, v_dim, dtype, group, splits):
    """No tile divides these blocks and lengths; row 1 is padding, and row 0 leaves all splits but one empty."""
    case = attention_case(
        generator,
        lengths=[1, 0, 131, 63],
        order=order,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
    )
    q_BHD = torch.randn(4, kv_heads * group, k_dim, generator=generator).to(getattr(torch, dtype))
    inputs = (case.layout, 1, q_BHD, case.kv_table_BN, case.context_len_B, k_dim**-0.5)
    expected, before = naive_decode.paged_decode(*cached(case.buffer, *inputs)), case.buffer.clone()
    out = triton_decode.paged_decode(*cached(case.buffer, *inputs), num_splits=splits)
    assert out.dtype == q_BHD.dtype
    assert (out[1] == 0).all()
    assert torch.equal(case.buffer, before)
    assert rel_error(out, expected) <= TOLERANCE[dtype]


@device_loop_bounds
def test_paged_decode_with_more_heads_than_a_tile(generator):
    """Tiles of a KV head's queries, KV heads and rows, all in one dimension of the grid; row 1 is padding."""
    case = attention_case(generator, lengths=[70, 0, 33], kv_heads=2, k_dim=16, v_dim=16, dtype="float32")
    q_BHD = torch.randn(3, 72, 16, generator=generator)
    inputs = (case.layout, 0, q_BHD, case.kv_table_BN, case.context_len_B, 0.25)
    expected = naive_decode.paged_decode(*cached(case.buffer, *inputs))
    for splits in (1, 2):
        out = triton_decode.paged_decode(*cached(case.buffer, *inputs), num_splits=splits)
        assert (out[1] == 0).all()
        for row in (0, 2):
            assert rel_error(out[row], expected[row]) <= 1e-5, f"row {row} in {splits} splits"


@device_loop_bounds
@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize("splits", [1, 2, 5, 9])
def test_paged_decode_around_a_tile_and_a_split(generator, keys, splits):
    """Splits that end with a whole tile, with a part of one, or have no token."""
    lengths = [1, keys - 1, keys, keys + 1, 2 * keys * splits, 2 * keys * splits + 1, keys * splits - 1]
    case = attention_case(generator, lengths=lengths, kv_heads=2, k_dim=16, v_dim=32, dtype="float32")
    q_BHD = torch.randn(len(lengths), 6, 16, generator=generator)
    inputs = (case.layout, 1, q_BHD, case.kv_table_BN, case.context_len_B, 0.25)
    expected = naive_decode.paged_decode(*cached(case.buffer, *inputs))
    out = triton_decode.paged_decode(*cached(case.buffer, *inputs), num_splits=splits, tiles=Tiles(keys, 4, 1, 1))
    for row, length in enumerate(lengths):
        assert rel_error(out[row], expected[row]) <= 1e-5, f"row {row} of {length} tokens"


@device_loop_bounds
def test_paged_decode_sees_its_keys_and_values(generator):
    """Poisoning one row of a live request shows in its output and in no other's."""
    case = attention_case(generator, lengths=[20, 20], k_dim=16, v_dim=16, dtype="float32")
    q_BHD = torch.randn(2, 4, 16, generator=generator)
    address = case.layout.address(0, int(case.kv_table_BN[1, 0]), 19, 1, 0)
    case.buffer[address : address + 64] = 0xFF
    out = triton_decode.paged_decode(
        *cached(case.buffer, case.layout, 0, q_BHD, case.kv_table_BN, case.context_len_B, 0.25)
    )
    assert out[0].isfinite().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


def test_paged_decode_refuses_what_it_cannot_do(generator):
    case = attention_case(generator, lengths=[4], k_dim=16, v_dim=16, dtype="float32")
    inputs = (case.kv_table_BN, case.context_len_B, 0.25)
    with pytest.raises(UserError, match="float64"):
        run(Backend("triton"), "paged_decode", case.buffer, case.layout, 0, torch.randn(1, 2, 16).double(), *inputs)
    latent = attention_case(generator, lengths=[4], kv_heads=1, k_dim=16, v_dim=0, dtype="float32")
    with pytest.raises(UserError, match="v_dim=0"):
        triton_decode.paged_decode(*cached(latent.buffer, latent.layout, 0, torch.randn(1, 2, 16), *inputs))
    with pytest.raises(UserError, match=r"scale=-0\.5"):
        triton_decode.paged_decode(*cached(case.buffer, case.layout, 0, torch.randn(1, 2, 16), *inputs[:2], -0.5))


# -- Block copy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [16, 8, 4, 2, 1, 4096])
def test_block_copy(generator, granule):
    """Random moves, many of them dependent: the result is that of one copy after the other."""
    cells = 48
    buffer = torch.randint(256, (cells * granule,), generator=generator, dtype=torch.uint8)
    expected = buffer.clone()
    moves = []
    while len(moves) < 30:
        src, dst, length = torch.randint(cells, (3,), generator=generator).tolist()
        length = min(length % 9, abs(src - dst), cells - max(src, dst))
        moves.append((src * granule, dst * granule, length * granule))
    assert triton_copy.block_copy(buffer, moves) == naive_copy.block_copy(expected, moves)
    assert torch.equal(buffer, expected), moves


def test_block_copy_checks_its_moves():
    buffer = poisoned(64, "cpu")
    with pytest.raises(ValueError, match="leaves the buffer"):
        triton_copy.block_copy(buffer, [(0, 32, 33)])
    with pytest.raises(ValueError, match="overlap"):
        triton_copy.block_copy(buffer, [(0, 8, 16)])
    assert triton_copy.block_copy(buffer, []) == 0
