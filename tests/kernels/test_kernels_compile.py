"""Every Triton kernel compiles for Hopper (sm_90) without a GPU, in the shared memory of one program and without spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from limits import SUBPROCESS_S

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hybridcache.kernels.block_copy import triton as block_copy  # noqa: E402
from hybridcache.kernels.gdn_decode import triton as gdn_decode  # noqa: E402
from hybridcache.kernels.gdn_decode.tiles import in_registers  # noqa: E402
from hybridcache.kernels.kv_store import triton as kv_store  # noqa: E402
from hybridcache.kernels.paged_decode import triton as paged_decode  # noqa: E402
from hybridcache.kernels.paged_decode.tiles import narrow, wide  # noqa: E402
from hybridcache.kernels.testing import attention_case, state_case  # noqa: E402
from hybridcache.memory.geometry import KERNEL_BLOCK_TOKENS  # noqa: E402

SHARED_MEMORY_LIMIT = 232_448
"""Bytes that one program may use on Hopper (227 KiB)."""
SHARED_MEMORY_PER_SM, REGISTERS_PER_SM = 233_472, 65_536
"""Of a multiprocessor; each program also takes 1 KiB of its shared memory (CUDA C++ Programming Guide)."""

TRITON_TYPE = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}


def compile_for_hopper(kernel, pointers: dict[str, str], scalars: dict[str, str], constants: dict, options: dict):
    """Compile as the launcher would for aligned arguments. ``pointers`` and ``scalars`` give types by parameter name;
    parameters annotated as int64 need none."""
    signature, aligned = {}, {}
    for index, param in enumerate(kernel.params):
        if param.name in constants:
            signature[param.name] = "constexpr"
            continue
        signature[param.name] = pointers.get(param.name) or scalars.get(param.name) or param.annotation_type
        assert signature[param.name], f"no type for {param.name}"
        specialised = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
        if param.name in pointers or param.annotation_type:
            aligned |= {(index,): [["tt.divisibility", 16]]} if specialised else {}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def ptxas_report(compiled, tmp_path: Path) -> str:
    """What the assembler says of registers, stack and spills."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = str(bundled) if bundled.exists() else shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("no ptxas: Triton bundles none here and none is on the PATH")
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    command = [ptxas, "-v", "--gpu-name=sm_90a", str(source), "-o", str(tmp_path / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SUBPROCESS_S).stderr


def assert_fits(compiled, tmp_path: Path) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY_LIMIT
    report = ptxas_report(compiled, tmp_path)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert len(spills) >= 2, report
    assert set(spills) == {"0"}, report


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_gdn_decode(state_dtype, tmp_path):
    layout = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype=state_dtype).layout
    activations = ("x_ptr", "weight_ptr", "a_ptr", "b_ptr", "out_ptr", "ring_ptr")
    pointers = {
        "state_ptr": "*" + TRITON_TYPE[state_dtype],
        **dict.fromkeys(activations, "*bf16"),
        **dict.fromkeys(("a_log_ptr", "dt_bias_ptr"), "*fp32"),
        **dict.fromkeys(("read_ptr", "write_ptr"), "*i32"),
        "position_ptr": "*i64",
    }
    tiles = in_registers(64, getattr(torch, state_dtype))
    constants = gdn_decode.constants(layout, torch.bfloat16, tiles)
    compiled = compile_for_hopper(
        gdn_decode.gdn_decode_kernel, pointers, {"layer": "i32"}, constants, gdn_decode.options(tiles)
    )
    assert_fits(compiled, tmp_path)
    assert re.search(r"ld\.global\.v4\.b32|ld\.global\.v2\.b32", compiled.asm["ptx"]), "state loads are not vectors"


def decode_variants():
    for kb in KERNEL_BLOCK_TOKENS:
        yield pytest.param("bfloat16", "bfloat16", kb, 11, 256, id=f"bf16-kb{kb}-D256")
    yield pytest.param("bfloat16", "bfloat16", 1056, 1, 256, id="bf16-kb1056-D256")
    yield pytest.param("bfloat16", "bfloat16", 16, 11, 128, id="bf16-kb16-D128")
    yield pytest.param("bfloat16", "bfloat16", 16, 11, 64, id="bf16-kb16-D64")
    yield pytest.param("bfloat16", "bfloat16", 16, 11, 32, id="bf16-kb16-D32")
    yield pytest.param("float16", "float16", 16, 11, 128, id="fp16-kb16-D128")
    yield pytest.param("bfloat16", "float8_e4m3fn", 16, 11, 256, id="fp8-kb16-D256")
    yield pytest.param("float32", "float32", 16, 11, 256, id="fp32-kb16-D256")


def compile_decode(layout, heads, dtype, choose, *, split=True):
    pointers = {
        "pool_ptr": "*" + TRITON_TYPE[layout.dtype],
        "q_ptr": "*" + TRITON_TYPE[dtype],
        **dict.fromkeys(("table_ptr", "length_ptr"), "*i32"),
        **dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32" if split else "*" + TRITON_TYPE[dtype]),
    }
    tiles = choose(layout, heads, getattr(torch, dtype))
    constants = paged_decode.constants(layout, heads, getattr(torch, dtype), tiles, split=split)
    options = {"num_warps": tiles.num_warps}
    scalars = {"scale_log2": "fp32", "splits": "i32"}
    return compile_for_hopper(paged_decode.paged_decode_kernel, pointers, scalars, constants, options), tiles


@pytest.mark.parametrize("choose", [wide, narrow])
@pytest.mark.parametrize(("dtype", "kv_dtype", "kb", "blocks", "dim"), decode_variants())
def test_paged_decode(dtype, kv_dtype, kb, blocks, dim, choose, tmp_path):
    layout = attention_case(
        torch.Generator(),
        lengths=[0],
        layers=1,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        k_dim=dim,
        v_dim=dim,
        dtype=kv_dtype,
    ).layout
    compiled, tiles = compile_decode(layout, 16, dtype, choose)
    assert_fits(compiled, tmp_path)
    assert tiles.programs_per_sm * (compiled.metadata.shared + 1024) <= SHARED_MEMORY_PER_SM
    registers = int(re.findall(r"Used (\d+) registers", ptxas_report(compiled, tmp_path))[-1])
    assert tiles.programs_per_sm * tiles.num_warps * 32 * registers <= REGISTERS_PER_SM
    if kv_dtype != "float32":
        assert "mma.sync" in compiled.asm["ptx"], "the matrix unit is not used"
    if kv_dtype == dtype:
        assert "cp.async" in compiled.asm["ptx"], "loads are not pipelined"
    assert "griddepcontrol.launch_dependents" in compiled.asm["ptx"]
    assert "griddepcontrol.wait" not in compiled.asm["ptx"], "only the reduction waits"


@pytest.mark.parametrize("choose", [wide, narrow])
@pytest.mark.parametrize(("dtype", "heads", "dim"), [("bfloat16", 64, 256), ("float32", 64, 128), ("bfloat16", 72, 64)])
def test_paged_decode_of_many_heads(dtype, heads, dim, choose, tmp_path):
    layout = attention_case(
        torch.Generator(), lengths=[0], layers=1, kv_heads=1, k_dim=dim, v_dim=dim, dtype=dtype
    ).layout
    assert_fits(compile_decode(layout, heads, dtype, choose)[0], tmp_path)


@pytest.mark.parametrize("choose", [wide, narrow])
@pytest.mark.parametrize("dim", [64, 256])
def test_paged_decode_without_splits(dim, choose, tmp_path):
    layout = attention_case(torch.Generator(), lengths=[0], layers=1, k_dim=dim, v_dim=dim).layout
    compiled, _ = compile_decode(layout, 16, "bfloat16", choose, split=False)
    assert_fits(compiled, tmp_path)
    assert "griddepcontrol" not in compiled.asm["ptx"], "no reduction follows"


@pytest.mark.parametrize("splits", [2, 66, 128])
def test_combine(splits, tmp_path):
    pointers = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = paged_decode.combine_constants(256, splits, dependent=True)
    options = paged_decode.combine_options(dependent=True)
    compiled = compile_for_hopper(paged_decode.combine_kernel, pointers, {"splits": "i32"}, constants, options)
    assert_fits(compiled, tmp_path)
    assert "griddepcontrol.wait" in compiled.asm["ptx"]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_kv_store(kv_dtype, tmp_path):
    layout = attention_case(torch.Generator(), lengths=[0], layers=1, dtype=kv_dtype).layout
    pointers = {
        "pool_ptr": "*" + TRITON_TYPE[kv_dtype],
        **dict.fromkeys(("k_ptr", "v_ptr"), "*bf16"),
        **dict.fromkeys(("table_ptr", "row_ptr"), "*i32"),
        "position_ptr": "*i64",
    }
    compiled = compile_for_hopper(kv_store.kv_store_kernel, pointers, {}, kv_store.constants(layout), kv_store.OPTIONS)
    assert_fits(compiled, tmp_path)


@pytest.mark.parametrize(("unit", "element"), [(16, "i64"), (8, "i64"), (4, "i32"), (2, "i16"), (1, "u8")])
def test_block_copy(unit, element, tmp_path):
    pointers = {"src_ptr": "*" + element, "dst_ptr": "*" + element, "move_ptr": "*i64"}
    compiled = compile_for_hopper(
        block_copy.block_copy_kernel, pointers, {}, block_copy.constants(unit), block_copy.options()
    )
    assert_fits(compiled, tmp_path)
    if unit == 16:
        for access in ("ld", "st"):
            assert re.search(rf"{access}\.global\.v2\.b64", compiled.asm["ptx"]), "not 16-byte vectors"
