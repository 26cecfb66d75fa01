"""Paged prefill compiles for Hopper for every layout, type and head width offered: no spills, and on the tensor cores."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_compile import (
    KERNEL_BLOCK_TOKENS,
    TRITON_TYPE,
    assert_fits,
    compile_for_hopper,
    ptxas_report,
)

from hybridcache.kernels.paged_prefill import triton as paged_prefill
from hybridcache.kernels.paged_prefill.tiles import choose_tile
from hybridcache.kernels.testing import attention_case


def variants():
    for kb in KERNEL_BLOCK_TOKENS:
        yield pytest.param("bfloat16", "bfloat16", kb, 11, 256, 16, 2, id=f"bf16-kb{kb}-D256")
    yield pytest.param("bfloat16", "bfloat16", 1056, 1, 256, 16, 2, id="bf16-kb1056-D256")
    yield pytest.param("float16", "float16", 16, 11, 256, 16, 2, id="fp16-kb16-D256")
    yield pytest.param("bfloat16", "bfloat16", 16, 11, 128, 32, 8, id="bf16-kb16-D128")
    yield pytest.param("bfloat16", "bfloat16", 16, 11, 64, 14, 2, id="bf16-kb16-D64-G7")
    yield pytest.param("bfloat16", "float8_e4m3fn", 16, 11, 256, 16, 2, id="fp8-kb16-D256")
    yield pytest.param("float32", "float32", 16, 11, 256, 16, 2, id="fp32-kb16-D256")
    yield pytest.param("float32", "float32", 16, 11, 128, 16, 2, id="fp32-kb16-D128")


def compiled_for(layout, heads, dtype, kv_dtype, tile):
    pointers = {
        "pool_ptr": "*" + TRITON_TYPE[kv_dtype],
        **dict.fromkeys(("q_ptr", "out_ptr"), "*" + TRITON_TYPE[dtype]),
        **dict.fromkeys(("table_ptr", "cu_ptr", "length_ptr"), "*i32"),
    }
    constants = paged_prefill.constants(layout, heads, getattr(torch, dtype), tile)
    scalars = {"scale_log2": "fp32", "rows": "i32", "tokens": "i32"}
    options = {"num_warps": tile.num_warps}
    return compile_for_hopper(paged_prefill.paged_prefill_kernel, pointers, scalars, constants, options)


@pytest.mark.parametrize("max_query_len", [1, 8192])
@pytest.mark.parametrize(("dtype", "kv_dtype", "kb", "blocks", "dim", "heads", "kv_heads"), variants())
def test_paged_prefill(dtype, kv_dtype, kb, blocks, dim, heads, kv_heads, max_query_len, tmp_path):
    layout = attention_case(
        torch.Generator(),
        lengths=[0],
        layers=1,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=kv_heads,
        k_dim=dim,
        v_dim=dim,
        dtype=kv_dtype,
    ).layout
    tile = choose_tile(layout, heads, getattr(torch, dtype), max_query_len)
    compiled = compiled_for(layout, heads, dtype, kv_dtype, tile)
    assert_fits(compiled, tmp_path)
    if dtype != "float32":
        assert "wgmma.mma_async" in compiled.asm["ptx"], "Hopper's matrix unit is not used"
        assert "serialized" not in ptxas_report(compiled, tmp_path)
    if dtype == kv_dtype == "bfloat16":
        assert compiled.asm["ptx"].count("cp.async.cg") > 0, "K and V are not copied asynchronously"
