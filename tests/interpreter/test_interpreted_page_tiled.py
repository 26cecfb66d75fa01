"""Page-tiled attention in Triton's interpreter against the references of paged decode and prefill.

Pools are poisoned with NaN and tables shuffled; a failure prints its seed.
"""

import random

import pytest
import torch

from benchmarks import page_tiled as triton
from hybridcache.errors import UserError
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.paged_decode import naive as naive_decode
from hybridcache.kernels.paged_prefill import naive as naive_prefill
from hybridcache.kernels.testing import attention_case, rel_error

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
LAYOUTS = [
    # order, page, kv_heads, dim
    pytest.param("layer_major", 16, 2, 32, id="layer-page16-K2-D32"),
    pytest.param("layer_major", 44, 1, 24, id="layer-page44-K1-D24"),
    pytest.param("block_major", 8, 2, 16, id="block-page8-K2-D16"),
]


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def paged(generator, lengths, order, page, kv_heads, dim, dtype):
    return attention_case(
        generator,
        lengths=lengths,
        order=order,
        kernel_block_tokens=page,
        kernel_blocks=1,
        kv_heads=kv_heads,
        k_dim=dim,
        v_dim=dim,
        dtype=dtype,
    )


@pytest.mark.parametrize(("order", "page", "kv_heads", "dim"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "group", "splits"), [("float32", 4, 1), ("bfloat16", 5, 3)])
def test_decode(generator, order, page, kv_heads, dim, dtype, group, splits):
    """Lengths below, at and above a page; row 2 is padding, its length stale."""
    lengths = [1, page, 0, page + 1, 3 * page, 130]
    case = paged(generator, lengths, order, page, kv_heads, dim, dtype)
    wide = torch.randn(len(lengths), 2 * kv_heads * group, dim, generator=generator)
    q_BHD = wide[:, kv_heads * group :].to(getattr(torch, dtype))
    inputs = (AttentionCache(case.buffer, case.layout, 1), q_BHD, case.kv_table_BN, case.context_len_B, dim**-0.5)
    expected = naive_decode.paged_decode(*inputs)
    out = triton.paged_decode(*inputs, num_splits=splits)
    assert out.dtype == q_BHD.dtype
    assert (out[2] == 0).all()
    assert rel_error(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("order", "page", "kv_heads", "dim"), LAYOUTS)
@pytest.mark.parametrize(("dtype", "group"), [("float32", 4), ("bfloat16", 5)])
def test_prefill(generator, order, page, kv_heads, dim, dtype, group):
    """Whole prompts and resumed chunks; row 2 is padding, rows 1 and 4 have no new tokens."""
    lengths, queries = [65, 9, 0, 64, 7, 130, 1], [65, 0, 5, 3, 0, 63, 1]
    case = paged(generator, lengths, order, page, kv_heads, dim, dtype)
    offsets = torch.tensor([0, *queries]).cumsum(0).int()
    q_THD = torch.randn(sum(queries), kv_heads * group, dim, generator=generator).to(getattr(torch, dtype))
    inputs = (
        AttentionCache(case.buffer, case.layout, 1),
        q_THD,
        case.kv_table_BN,
        offsets,
        case.context_len_B,
        dim**-0.5,
        65,
        130,
    )
    expected = naive_prefill.paged_prefill(*inputs)
    out = triton.paged_prefill(*inputs)
    assert (out[65:70] == 0).all()
    assert rel_error(out, expected) <= TOLERANCE[dtype]


def test_a_table_of_larger_blocks_is_refused(generator):
    case = attention_case(generator, lengths=[20], kernel_block_tokens=8, kernel_blocks=3, k_dim=16, v_dim=16)
    q_BHD = torch.zeros(1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"kernel_block_tokens=8: .*24 tokens"):
        triton.paged_decode(
            AttentionCache(case.buffer, case.layout, 0), q_BHD, case.kv_table_BN, case.context_len_B, 1.0
        )


def test_k_and_v_of_two_widths_are_refused(generator):
    case = attention_case(generator, lengths=[20], kernel_block_tokens=8, kernel_blocks=1, k_dim=16, v_dim=32)
    q_BHD = torch.zeros(1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"v_dim=32: .*16"):
        triton.paged_decode(
            AttentionCache(case.buffer, case.layout, 0), q_BHD, case.kv_table_BN, case.context_len_B, 1.0
        )
