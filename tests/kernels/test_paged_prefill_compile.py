"""Paged prefill compiles for Hopper for every layout, type and head width offered: no spills, and on the tensor cores."""

from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from dispatch_proof import unordered  # noqa: E402
from test_kernels_compile import KERNEL_BLOCK_TOKENS, TRITON_TYPE, assert_fits, compile_for_hopper, ptxas_report  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from hybridcache.kernels.caches import cache_of  # noqa: E402
from hybridcache.kernels.paged_prefill import hopper, hopper_kernel  # noqa: E402
from hybridcache.kernels.paged_prefill import triton as paged_prefill  # noqa: E402
from hybridcache.kernels.paged_prefill.tiles import choose_ring, choose_tiles  # noqa: E402
from hybridcache.kernels.testing import attention_case  # noqa: E402


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
    tile = choose_tiles(layout, heads, getattr(torch, dtype), max_query_len)
    compiled = compiled_for(layout, heads, dtype, kv_dtype, tile)
    assert_fits(compiled, tmp_path)
    if dtype != "float32":
        assert "wgmma.mma_async" in compiled.asm["ptx"], "Hopper's matrix unit is not used"
        assert "serialized" not in ptxas_report(compiled, tmp_path)
    if dtype == kv_dtype == "bfloat16":
        assert compiled.asm["ptx"].count("cp.async.cg") > 0, "K and V are not copied asynchronously"


def gluon_for_hopper(kernel, pointers: dict[str, str], scalars: dict[str, str], constants: dict):
    """As ``compile_for_hopper``, for a kernel written in Gluon."""
    signature, aligned = dict.fromkeys(constants, "constexpr"), {}
    for index, param in enumerate(kernel.params):
        if param.name in constants:
            continue
        signature[param.name] = pointers.get(param.name) or scalars.get(param.name) or param.annotation_type
        if param.name not in scalars and not param.do_not_specialize_on_alignment:
            aligned[(index,)] = [["tt.divisibility", 16]]
    signature = {param.name: signature[param.name] for param in kernel.params}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(
    ("dtype", "kb", "blocks", "dim", "heads", "kv_heads"),
    [
        *(pytest.param("bfloat16", kb, 11, 256, 16, 2, id=f"bf16-kb{kb}-D256") for kb in KERNEL_BLOCK_TOKENS),
        pytest.param("bfloat16", 1056, 1, 256, 16, 2, id="bf16-kb1056-D256"),
        pytest.param("float16", 8, 11, 256, 16, 2, id="fp16-kb8-D256"),
        pytest.param("bfloat16", 16, 11, 128, 32, 8, id="bf16-kb16-D128"),
        pytest.param("bfloat16", 16, 11, 64, 14, 2, id="bf16-kb16-D64-G7"),
    ],
)
def test_paged_prefill_in_gluon(dtype, kb, blocks, dim, heads, kv_heads, tmp_path):
    case = attention_case(
        torch.Generator(),
        lengths=[0],
        layers=2,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=kv_heads,
        k_dim=dim,
        v_dim=dim,
        dtype=dtype,
    )
    ring = choose_ring(cache_of(case.buffer, case.layout, 1), torch.empty(1, heads, dim, dtype=getattr(torch, dtype)))
    assert ring is not None
    assert 2 * ring.consumer_registers + ring.producer_registers <= 504, "three groups of 128 threads, 65,536 registers"
    pointers = {
        **dict.fromkeys(("pool_ptr", "q_ptr", "out_ptr"), "*" + TRITON_TYPE[dtype]),
        **dict.fromkeys(("table_ptr", "cu_ptr", "length_ptr"), "*i32"),
    }
    scalars = {"scale_log2": "fp32", "rows": "i32", "tokens": "i32", "search_steps": "i32"}
    constants = hopper.constants(case.layout, heads, ring)
    compiled = gluon_for_hopper(hopper_kernel.hopper_prefill_kernel, pointers, scalars, constants)
    assert_fits(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.mbarrier.arrive.noinc" in ptx
    assert "serialized" not in ptxas_report(compiled, tmp_path)
    assert unordered(ptx, "hopper_prefill_kernel", Path(hopper_kernel.__file__).read_text()) == []
    for registers in (ring.consumer_registers, ring.producer_registers):
        assert f"setmaxnreg.dec.sync.aligned.u32 \t{registers}" in ptx


def test_what_the_gluon_kernel_leaves_to_the_other():
    def ring(heads=16, q_dtype=torch.bfloat16, **options):
        case = attention_case(torch.Generator(), lengths=[0], layers=1, **options)
        return choose_ring(
            cache_of(case.buffer, case.layout, 0), torch.empty(3, heads, case.layout.k_dim, dtype=q_dtype)
        )

    assert ring() is not None
    assert ring(q_dtype=torch.float16) is None
    assert ring(dtype="float8_e4m3fn") is None
    assert ring(dtype="float32", q_dtype=torch.float32) is None
    assert ring(v_dim=128) is None
    assert ring(k_dim=96, v_dim=96) is None
    assert ring(heads=2 * 129) is None
