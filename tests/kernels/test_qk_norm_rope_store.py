"""The reference equals Transformers, the torch operation the reference; the kernel compiles for Hopper without a GPU."""

import random
from functools import partial

import pytest
import torch
from kernel_checks import run

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.qk_norm_rope_store import naive
from hybridcache.kernels.testing import attention_case, cached

triton = pytest.importorskip("triton")

from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper  # noqa: E402

from hybridcache.kernels.qk_norm_rope_store import triton as fused  # noqa: E402


@pytest.fixture
def generator():
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def inputs_of(generator, case, heads, kv_heads, dim, pairs, dtype="float64"):
    """Every token of rows 0 and 2 and, between them, one of the padding row 1 whose position is stale."""
    lengths = case.lengths
    row_T = torch.tensor([0] * lengths[0] + [1] + [2] * lengths[2], dtype=torch.int32)
    position_T = torch.cat([torch.arange(lengths[0]), torch.tensor([10**6]), torch.arange(lengths[2])])
    tokens, dtype = len(row_T), getattr(torch, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    qkv = draw(tokens, heads + 2 * kv_heads, dim).to(dtype).split([heads, kv_heads, kv_heads], dim=1)
    weights = [(draw(dim) * 0.5).to(exact) for _ in range(2)]
    angle_TP = draw(tokens, pairs).to(exact) * 3
    return (*qkv, *weights, 1e-6, angle_TP.cos(), angle_TP.sin(), case.kv_table_BN, row_T, position_T)


def poisoned_case(generator, heads, dim, dtype):
    options = {"kv_heads": heads, "k_dim": dim, "v_dim": dim, "dtype": dtype, "extra_entries": 0, "fill": ()}
    return attention_case(generator, lengths=[5, 0, 97], **options)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "pairs"), [(4, 2, 16, 2), (16, 2, 256, 32), (6, 3, 24, 12)])
def test_the_torch_operation_equals_the_reference(generator, heads, kv_heads, dim, pairs):
    case, backend = poisoned_case(generator, kv_heads, dim, "float64"), Backend("torch")
    inputs = inputs_of(generator, case, heads, kv_heads, dim, pairs)
    expected_buffer = case.buffer.clone()
    expected = naive.qk_norm_rope_store(*cached(expected_buffer, case.layout, 1, *inputs))
    out = run(backend, "qk_norm_rope_store", case.buffer, case.layout, 1, *inputs)
    torch.testing.assert_close(out, expected)
    stored, wanted = (buffer.view(torch.float64) for buffer in (case.buffer, expected_buffer))
    assert torch.equal(stored.isnan(), wanted.isnan())
    torch.testing.assert_close(stored.nan_to_num(), wanted.nan_to_num())
    assert wanted.isfinite().sum() == 2 * 102 * kv_heads * dim, "every token of rows 0 and 2, and nothing else"
    assert backend.launches == {"qk_norm_rope_store[torch]": 1}


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32"])
def test_results_are_rounded_once(generator, kv_dtype):
    """In bfloat16 the torch operation gives the float64 reference, rounded, but where it lies half-way between two values."""
    case = poisoned_case(generator, 2, 32, kv_dtype)
    inputs = inputs_of(generator, case, 4, 2, 32, 4, "bfloat16")
    expected = naive.qk_norm_rope_store(*cached(case.buffer.clone(), case.layout, 0, *inputs))
    out = run(Backend("torch"), "qk_norm_rope_store", case.buffer, case.layout, 0, *inputs)
    assert out.dtype == torch.bfloat16
    assert (out == expected.bfloat16()).double().mean() > 0.99


def test_the_reference_is_that_of_transformers(generator):
    """``Qwen3NextRMSNorm`` and ``apply_rotary_pos_emb`` of Transformers 5."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, apply_rotary_pos_emb

    heads, dim, pairs = 3, 24, 4
    q, k = (torch.randn(2, heads, 7, dim, generator=generator) for _ in range(2))
    norms = [Qwen3NextRMSNorm(dim, eps=1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_(0.0, 0.5, generator=generator)
    angle_BTP = torch.randn(2, 7, pairs, generator=generator) * 3
    both = torch.cat([angle_BTP, angle_BTP], dim=-1)
    with torch.no_grad():
        expected = apply_rotary_pos_emb(norms[0](q), norms[1](k), both.cos(), both.sin())
    for x, norm, wanted in zip((q, k), norms, expected):
        for b in range(2):
            angles = (angle_BTP[b].cos(), angle_BTP[b].sin())
            out = naive.norm_rotate(x[b].transpose(0, 1), norm.weight.data, 1e-6, *angles)
            torch.testing.assert_close(out.transpose(0, 1), wanted[b].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: kernels are interpreted in this process"
)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "heads", "kv_heads", "dim", "pairs"),
    [
        ("bfloat16", "bfloat16", 16, 2, 256, 32),
        ("bfloat16", "float8_e4m3fn", 16, 2, 256, 32),
        ("float32", "float32", 16, 2, 256, 32),
        ("float16", "float16", 24, 8, 128, 64),
        ("bfloat16", "bfloat16", 8, 8, 80, 20),
    ],
)
def test_it_compiles_for_hopper(dtype, kv_dtype, heads, kv_heads, dim, pairs, tmp_path):
    layout = attention_case(
        torch.Generator(), lengths=[0], layers=1, kv_heads=kv_heads, k_dim=dim, v_dim=dim, dtype=kv_dtype
    ).layout
    pointers = {
        "pool_ptr": "*" + TRITON_TYPE[kv_dtype],
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*" + TRITON_TYPE[dtype]),
        **dict.fromkeys(("q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("table_ptr", "row_ptr"), "*i32"),
        "position_ptr": "*i64",
    }
    constants = fused.constants(layout, heads, pairs, 1e-6, getattr(torch, dtype))
    compiled = compile_for_hopper(fused.qk_norm_rope_store_kernel, pointers, {}, constants, fused.OPTIONS)
    assert_fits(compiled, tmp_path)
