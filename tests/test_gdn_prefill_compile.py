"""GDN prefill's kernels compile for Hopper (sm_90) without a GPU, without spills, and use its matrix unit."""

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper, ptxas_report  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from hybridcache.kernels.gdn_prefill import hopper_state  # noqa: E402
from hybridcache.kernels.gdn_prefill.tiles import constants, default_tiles  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton import RING_TILE  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_chunk import chunk_kernel  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_conv import conv_kernel, ring_kernel  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_state import state_kernel  # noqa: E402
from hybridcache.kernels.testing import state_case  # noqa: E402

PROCESSORS = 132
"""Of an H100."""
SHARED_MEMORY_PER_SM, REGISTERS_PER_SM = 233_472, 65_536
"""Of one of them; each program also takes 1 KiB of its shared memory (CUDA C++ Programming Guide)."""


class Target:
    """One layout and activation dtype, and the kernels compiled for them as the launcher would."""

    def __init__(self, dtype="bfloat16", dim=128, rows=1, checkpoints=False, state_dtype="float32"):
        self.layout = state_case(
            torch.Generator(), positions=[-1], layers=1, key_dim=dim, value_dim=dim, state_dtype=state_dtype,
            conv_dtype=dtype,
        ).layout  # fmt: skip
        self.tiles = default_tiles(self.layout, getattr(torch, dtype), rows, PROCESSORS)
        self.constant = constants(self.layout, getattr(torch, dtype), self.tiles, checkpoints)
        element = TRITON_TYPE[dtype]
        activations = ("y", "out", "x", "weight", "a", "b", "solve", "score", "ring")
        self.pointers = {
            "state_ptr": "*" + TRITON_TYPE[state_dtype],
            **{f"{name}_ptr": "*" + element for name in activations},
            **{f"{name}_ptr": "*fp32" for name in ("gates", "a_log", "dt_bias")},
            **{f"{name}_ptr": "*i32" for name in ("index", "first", "table", "cu", "start", "checkpoint")},
        }
        self.scalars = dict.fromkeys(("layer", "interval", "rows", "tokens", "checkpoints"), "i32")

    def compile(self, kernel, warps, registers=None, **extra):
        names, chunk = [param.name for param in kernel.params], self.tiles.chunk
        element = self.pointers["y_ptr"][1:]
        descriptors = {
            "key_desc": f"tensordesc<{element}[{chunk}, {self.constant['BLOCK_K']}]>",
            **dict.fromkeys(("value_desc", "out_desc"), f"tensordesc<{element}[{chunk}, {self.tiles.value_tile}]>"),
            **dict.fromkeys(("solve_desc", "score_desc"), f"tensordesc<{element}[{chunk}, {chunk}]>"),
            "gates_desc": f"tensordesc<fp32[{chunk}]>",
        }
        pointers = {name: kind for name, kind in self.pointers.items() if name in names}
        constant = {name: value for name, value in self.constant.items() if name in names}
        options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
        return compile_for_hopper(kernel, pointers, self.scalars | descriptors, constant | extra, options)


def assert_on_matrix_unit(compiled, tmp_path):
    """Warpgroup products, and none that the assembler had to serialise."""
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "serialized" not in ptxas_report(compiled, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_conv_and_rings(dtype, tmp_path):
    target = Target(dtype, checkpoints=True)
    assert_fits(target.compile(conv_kernel, target.tiles.conv_warps), tmp_path)
    extra = {"CHANNELS": target.layout.conv_channels, "BLOCK": RING_TILE}
    assert_fits(target.compile(ring_kernel, 4, **extra), tmp_path)


@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 128), ("bfloat16", 256), ("float16", 64), ("float32", 128)])
def test_chunks(dtype, dim, tmp_path):
    target = Target(dtype, dim)
    compiled = target.compile(chunk_kernel, target.tiles.chunk_warps, target.tiles.chunk_registers)
    assert_fits(compiled, tmp_path)
    if target.tiles.chunk_registers:
        assert 3 * (compiled.metadata.shared + 1024) <= SHARED_MEMORY_PER_SM
        assert 3 * 32 * target.tiles.chunk_warps * target.tiles.chunk_registers <= REGISTERS_PER_SM
    if dtype != "float32" and dim <= 128:
        assert_on_matrix_unit(compiled, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "dim", "rows", "checkpoints", "state_dtype"),
    [
        pytest.param("bfloat16", 128, 1, False, "float32", id="bf16-D128-B1"),
        pytest.param("bfloat16", 128, 1, True, "float32", id="bf16-D128-B1-checkpoints"),
        pytest.param("bfloat16", 128, 16, True, "float32", id="bf16-D128-B16-checkpoints"),
        pytest.param("bfloat16", 128, 16, True, "bfloat16", id="bf16-D128-B16-checkpoints-bf16-state"),
        pytest.param("float16", 64, 1, True, "float32", id="fp16-D64-B1-checkpoints"),
        pytest.param("bfloat16", 256, 1, True, "float32", id="bf16-D256-B1-checkpoints"),
        pytest.param("float32", 128, 1, True, "float32", id="fp32-D128-B1-checkpoints"),
    ],
)
def test_states(dtype, dim, rows, checkpoints, state_dtype, tmp_path):
    target = Target(dtype, dim, rows, checkpoints, state_dtype)
    compiled = target.compile(state_kernel, target.tiles.state_warps)
    assert_fits(compiled, tmp_path)
    if dtype != "float32" and dim <= 128:
        assert_on_matrix_unit(compiled, tmp_path)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(("value_tile", "warps", "stages"), [(64, 4, 2), (64, 4, 3), (128, 8, 3)])
def test_other_tiles_of_states(value_tile, warps, stages, checkpoints, tmp_path):
    """Those that ``benchmarks/gdn_prefill.py`` times."""
    target = Target(checkpoints=checkpoints)
    target.tiles = replace(target.tiles, value_tile=value_tile, state_warps=warps, stages=stages)
    target.constant |= {"BLOCK_V": value_tile, "STAGES": stages}
    assert_fits(target.compile(state_kernel, warps), tmp_path)


@pytest.mark.parametrize(("warps", "registers"), [(4, None), (8, None)])
def test_other_tiles_of_chunks(warps, registers, tmp_path):
    assert_fits(Target().compile(chunk_kernel, warps, registers), tmp_path)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "dim"),
    [
        ("bfloat16", "float32", 128),
        ("bfloat16", "bfloat16", 128),
        ("float16", "float32", 128),
        ("bfloat16", "float32", 64),
    ],
)
def test_states_on_hopper(dtype, state_dtype, dim, checkpoints, tmp_path):
    target, kernel = (
        Target(dtype, dim, checkpoints=checkpoints, state_dtype=state_dtype),
        hopper_state.hopper_state_kernel,
    )
    assert hopper_state.supports(target.layout, getattr(torch, dtype), target.tiles)
    element = TRITON_TYPE[dtype]
    square = gl.NVMMASharedLayout.get_default_for([64, 64], getattr(gl, dtype))
    row = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    descriptors = {
        "key_desc": f"tensordesc<{element}[64, {dim}],{square!r}>",
        **dict.fromkeys(
            ("value_desc", "solve_desc", "score_desc", "out_desc"), f"tensordesc<{element}[64, 64],{square!r}>"
        ),
        "gates_desc": f"tensordesc<fp32[256],{row!r}>",
    }
    signature, aligned, constant = {}, {}, {}
    for index, param in enumerate(kernel.params):
        if param.name in target.constant:
            signature[param.name], constant[param.name] = "constexpr", target.constant[param.name]
            continue
        kinds = target.pointers | target.scalars | descriptors
        signature[param.name] = kinds.get(param.name) or param.annotation_type
        fixed = param.name in target.scalars or param.name in descriptors or param.do_not_specialize_on_alignment
        aligned |= {} if fixed else {(index,): [["tt.divisibility", 16]]}
    source = GluonASTSource(kernel, signature, constexprs=constant, attrs=aligned)
    options = {"num_warps": 4, "maxnreg": hopper_state.REGISTERS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert_fits(compiled, tmp_path)
    assert_on_matrix_unit(compiled, tmp_path)
    assert "warpgroup.wait is injected" not in ptxas_report(compiled, tmp_path), "products wait for one another"
