"""q/k norm, rotary positions and KV store against the float64 reference, in Triton's interpreter."""

import random

import pytest
import torch

from hybridcache.errors import UserError
from hybridcache.kernels.qk_norm_rope_store import naive
from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store
from hybridcache.kernels.testing import attention_case, byte_index, cached, rel_error

EPS = 1e-6
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def inputs_of(generator, case, heads, pairs, dtype):
    """Tokens of all rows and of a padding row with a stale position; q, k and v are slices of one projection, as the model
    has them, with a gate behind each query head."""
    tokens = [(row, position) for row, length in enumerate(case.lengths) for position in range(length)]
    tokens.insert(2, (case.lengths.index(0), 10**6))
    layout, count = case.layout, len(tokens)
    sizes = [2 * heads * layout.k_dim, layout.num_kv_heads * layout.k_dim, layout.num_kv_heads * layout.v_dim]
    projected = torch.randn(count, sum(sizes), generator=generator).to(getattr(torch, dtype))
    q, k, v = projected.split(sizes, dim=1)
    angle_TP = torch.rand(count, pairs, generator=generator) * 6.3
    weights = (torch.randn(2, layout.k_dim, generator=generator) * 0.3).to(
        torch.float64 if dtype == "float64" else torch.float32
    )
    return (
        q.unflatten(1, (heads, 2 * layout.k_dim))[:, :, : layout.k_dim],
        k.unflatten(1, (layout.num_kv_heads, layout.k_dim)),
        v.unflatten(1, (layout.num_kv_heads, layout.v_dim)),
        weights[0],
        weights[1],
        EPS,
        angle_TP.cos().to(weights.dtype),
        angle_TP.sin().to(weights.dtype),
        case.kv_table_BN,
        torch.tensor([row for row, _ in tokens], dtype=torch.int32),
        torch.tensor([position for _, position in tokens]),
    )


@pytest.mark.parametrize(
    ("order", "kb", "blocks", "heads", "kv_heads", "dim", "v_dim", "pairs"),
    [
        pytest.param("block_major", 8, 3, 4, 2, 16, 16, 2, id="block-H4-K2-D16-P2"),
        pytest.param("layer_major", 12, 1, 3, 1, 24, 40, 5, id="layer-H3-K1-D24x40-P5"),
        pytest.param("block_major", 4, 1, 6, 3, 32, 8, 16, id="block-H6-K3-D32x8-all-rotated"),
        pytest.param("layer_major", 16, 2, 70, 1, 16, 16, 1, id="layer-H70-K1-D16-P1"),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_qk_norm_rope_store(generator, order, kb, blocks, heads, kv_heads, dim, v_dim, pairs, dtype):
    case = attention_case(
        generator,
        lengths=[1, 0, 2 * kb * blocks + 3, 7],
        order=order,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=kv_heads,
        k_dim=dim,
        v_dim=v_dim,
        dtype=dtype,
    )
    case.buffer.fill_(0xFF)
    inputs = inputs_of(generator, case, heads, pairs, dtype)
    expected_buffer = case.buffer.clone()
    expected = naive.qk_norm_rope_store(*cached(expected_buffer, case.layout, 1, *inputs))
    out = qk_norm_rope_store(*cached(case.buffer, case.layout, 1, *inputs))
    assert out.dtype == inputs[0].dtype
    assert out.is_contiguous()
    assert rel_error(out, expected) <= TOLERANCE[dtype]
    for row in (0, 2, 3):
        index = byte_index(case, 1, row, 0)
        stored, wanted = (buffer[index].view(getattr(torch, dtype)) for buffer in (case.buffer, expected_buffer))
        assert rel_error(stored, wanted) <= TOLERANCE[dtype]
        case.buffer[index] = expected_buffer[index]
    assert torch.equal(case.buffer, expected_buffer), "V, or bytes that are nobody's"


def test_what_does_not_fit_is_refused(generator):
    case = attention_case(generator, lengths=[3, 0], kv_heads=1, k_dim=16, v_dim=16, dtype="float32")
    inputs = list(inputs_of(generator, case, 2, 2, "float32"))
    wide = torch.randn(4, 2, 24)
    with pytest.raises(UserError, match="head_dim=24"):
        qk_norm_rope_store(*cached(case.buffer, case.layout, 0, wide, *inputs[1:]))
    angles = torch.zeros(4, 9)
    with pytest.raises(UserError, match="rotary_dim=18"):
        qk_norm_rope_store(*cached(case.buffer, case.layout, 0, *inputs[:6], angles, angles, *inputs[8:]))
    strided = torch.randn(4, 16, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="q strides"):
        qk_norm_rope_store(*cached(case.buffer, case.layout, 0, strided, *inputs[1:]))
    assert qk_norm_rope_store(
        *cached(
            case.buffer,
            case.layout,
            0,
            *(x[:0] for x in inputs[:3]),
            *inputs[3:6],
            *(x[:0] for x in inputs[6:8]),
            *inputs[8:],
        )
    ).shape == (0, 2, 16)
