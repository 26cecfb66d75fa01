"""The reference equals what the model's attention layer does in parts; the kernel compiles for Hopper without a GPU."""

import random

import pytest
import torch

from hybridcache.kernels.kv_store import naive as naive_store
from hybridcache.kernels.qk_norm_rope_store import naive
from hybridcache.kernels.testing import attention_case
from models.configs import shipped_config
from models.qwen3_next.layers import RMSNorm, Rotary, rotate

triton = pytest.importorskip("triton")

from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper  # noqa: E402

from hybridcache.kernels.qk_norm_rope_store import triton as fused  # noqa: E402


@pytest.mark.parametrize("name", ["tiny", "qwen3_next_80b_a3b"])
def test_the_reference_is_the_models_norm_rotary_and_store(name):
    seed = random.SystemRandom().randrange(1 << 31)
    generator = torch.Generator().manual_seed(seed)
    config, device = shipped_config(name), torch.device("cpu")
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    case = attention_case(
        generator, lengths=[5, 9], kv_heads=kv_heads, k_dim=dim, v_dim=dim, dtype="float64", extra_entries=0
    )
    case.buffer.fill_(0xFF)
    row_T = torch.tensor([0] * 5 + [1] * 9, dtype=torch.int32)
    position_T = torch.cat([torch.arange(5), torch.arange(9)])
    q, k, v = (torch.randn(14, count, dim, generator=generator).double() for count in (heads, kv_heads, kv_heads))
    norms = [RMSNorm(dim, config.rms_norm_eps, torch.float64, device) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_(0.0, 0.5, generator=generator)
    cos, sin = Rotary(config, torch.float64, device)(position_T)

    expected = case.buffer.clone()
    expected_q, expected_k = (rotate(norm(x), cos, sin) for norm, x in zip(norms, (q, k)))
    naive_store.kv_store(expected, case.layout, 1, expected_k, v, case.kv_table_BN, row_T, position_T)
    weights = (norms[0].weight, norms[1].weight, config.rms_norm_eps)
    tables = (case.kv_table_BN, row_T, position_T)
    out = naive.qk_norm_rope_store(case.buffer, case.layout, 1, q, k, v, *weights, cos[:, 0], sin[:, 0], *tables)
    torch.testing.assert_close(out, expected_q, msg=lambda text: f"seed {seed}: {text}")
    assert torch.equal(case.buffer.isnan(), expected.isnan())
    stored, wanted = (buffer.view(torch.float64).nan_to_num(nan=7.0) for buffer in (case.buffer, expected))
    torch.testing.assert_close(stored, wanted, msg=lambda text: f"seed {seed}: {text}")
    assert (stored != 7.0).sum() >= 2 * 14 * kv_heads * dim


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
    compiled = compile_for_hopper(fused.qk_norm_rope_store_kernel, pointers, {}, constants, fused.options())
    assert_fits(compiled, tmp_path)
