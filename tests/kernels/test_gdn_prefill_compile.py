"""GDN prefill's kernels compile for Hopper (sm_90) without a GPU, without spills, and use its matrix unit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from dispatch_proof import unordered  # noqa: E402
from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper, ptxas_report  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from hybridcache.kernels.devices import warn_once  # noqa: E402
from hybridcache.kernels.gdn_prefill import hopper_state  # noqa: E402
from hybridcache.kernels.gdn_prefill import tiles as prefill_tiles  # noqa: E402
from hybridcache.kernels.gdn_prefill.tiles import PROCESSORS, Tiles, constants, default_tiles, why_not_hopper  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton import RING_TILE  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_chunk import chunk_kernel  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_conv import conv_kernel  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_ring import ring_kernel  # noqa: E402
from hybridcache.kernels.gdn_prefill.triton_state import state_kernel  # noqa: E402
from hybridcache.kernels.testing import state_case  # noqa: E402

SHARED_MEMORY_PER_SM, REGISTERS_PER_SM = 233_472, 65_536
"""Of one of them; each program also takes 1 KiB of its shared memory (CUDA C++ Programming Guide)."""


class Target:
    """One layout and activation dtype, and the kernels compiled for them as the launcher would."""

    def __init__(self, dtype="bfloat16", dim=128, rows=1, checkpoints=False, state_dtype="float32", **tiles):
        self.layout = state_case(
            torch.Generator(), positions=[-1], layers=1, key_dim=dim, value_dim=dim, state_dtype=state_dtype,
            conv_dtype=dtype,
        ).layout  # fmt: skip
        self.tiles = default_tiles(self.layout, getattr(torch, dtype), rows, PROCESSORS)
        self.tiles = replace(self.tiles, **tiles)
        self.constant = dict(constants(self.layout, getattr(torch, dtype), self.tiles, checkpoints))
        # As the model stores its weights.
        self.constant |= {"WEIGHT_STRIDE_C": 1, "WEIGHT_STRIDE_W": self.layout.conv_channels}
        element = TRITON_TYPE[dtype]
        activations = ("y", "out", "x", "weight", "a", "b", "solve", "score", "ring")
        self.pointers = {
            "state_ptr": "*" + TRITON_TYPE[state_dtype],
            **{f"{name}_ptr": "*" + element for name in activations},
            **{f"{name}_ptr": "*fp32" for name in ("gates", "a_log", "dt_bias")},
            **{f"{name}_ptr": "*i32" for name in ("index", "first", "read", "write", "cu", "start", "checkpoint")},
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


def assert_copies_vectors(compiled, steps, words):
    """Whole chunks of q, k and of v are loaded and stored in vectors of 32-bit words, each thread's inputs once."""
    for what, least in (("ld", 2 * (steps + 3)), ("st", 2 * steps)):
        found = re.findall(rf"{what}\.global(?:\.\w+)*\.v(\d)\.b32", compiled.asm["ptx"])
        assert found.count(str(words)) >= least, found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_conv_and_rings(dtype, tmp_path):
    target = Target(dtype, checkpoints=True)
    compiled = target.compile(conv_kernel, target.tiles.conv_warps)
    assert_fits(compiled, tmp_path)
    assert_copies_vectors(compiled, target.tiles.conv_steps, 4 if dtype == "float32" else 2)
    if dtype != "float32":
        assert programs(compiled, tmp_path) * target.tiles.conv_warps >= 32, "too few warps to keep the memory busy"
    extra = {"CHANNELS": target.layout.conv_channels, "BLOCK": RING_TILE}
    assert_fits(target.compile(ring_kernel, 4, **extra), tmp_path)


@pytest.mark.parametrize(("steps", "warps"), [(8, 4), (16, 4), (4, 16)])
def test_other_tiles_of_conv(steps, warps, tmp_path):
    """Those that ``benchmarks/variants.py`` times."""
    target = Target(conv_steps=steps, conv_warps=warps)
    compiled = target.compile(conv_kernel, warps)
    assert_fits(compiled, tmp_path)
    assert_copies_vectors(compiled, steps, 4 if (steps, warps) == (8, 4) else 2)
    assert programs(compiled, tmp_path) * warps >= 16


@pytest.mark.parametrize(("dtype", "dim", "width"), [("bfloat16", 64, 4), ("bfloat16", 256, 4), ("bfloat16", 96, 20)])
def test_conv_of_other_shapes(dtype, dim, width, tmp_path):
    target = Target(dtype, dim)
    target.constant |= {"WIDTH": width, "WEIGHT_STRIDE_C": width, "WEIGHT_STRIDE_W": 1}
    assert_fits(target.compile(conv_kernel, target.tiles.conv_warps), tmp_path)


def programs(compiled, tmp_path):
    """How many run on a multiprocessor, by registers and shared memory."""
    registers = int(re.findall(r"Used (\d+) registers", ptxas_report(compiled, tmp_path))[-1])
    threads = 32 * compiled.metadata.num_warps
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads)
    return min(by_registers, SHARED_MEMORY_PER_SM // (compiled.metadata.shared + 1024), 2048 // threads)


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
@pytest.mark.parametrize(("value_tile", "warps"), [(64, 4), (128, 8)])
def test_other_tiles_of_states(value_tile, warps, checkpoints, tmp_path):
    """Those that ``benchmarks/variants.py`` times."""
    target = Target(checkpoints=checkpoints, value_tile=value_tile, state_warps=warps)
    assert_fits(target.compile(state_kernel, warps), tmp_path)


def test_chunks_without_a_limit_of_registers(tmp_path):
    """``benchmarks/variants.py`` times them too."""
    assert_fits(Target().compile(chunk_kernel, 4), tmp_path)


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
    assert why_not_hopper(target.layout, getattr(torch, dtype), target.tiles) is None
    element = TRITON_TYPE[dtype]
    square = gl.NVMMASharedLayout.get_default_for([64, 64], getattr(gl, dtype))
    row = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    descriptors = {
        "key_desc": f"tensordesc<{element}[64, {dim}],{square!r}>",
        **dict.fromkeys(
            ("value_desc", "solve_desc", "score_desc", "out_desc"), f"tensordesc<{element}[64, 64],{square!r}>"
        ),
        "gates_desc": f"tensordesc<fp32[128],{row!r}>",
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
    assert unordered(compiled.asm["ptx"], "hopper_state_kernel", Path(hopper_state.__file__).read_text()) == []


def test_which_tiles_are_chosen(monkeypatch, caplog):
    """Gluon where Hopper allows, wide tiles in Triton where rows are many; shapes and device alone choose."""
    layout = Target().layout

    def chosen(rows, dtype="bfloat16", hopper=True):
        tiles = default_tiles(layout, getattr(torch, dtype), rows, PROCESSORS, hopper=hopper)
        return "gluon" if tiles.hopper else f"triton {tiles.value_tile}"

    assert [chosen(rows) for rows in (1, 8, 16, 64)] == ["gluon", "gluon", "triton 128", "triton 128"]
    assert [chosen(rows, hopper=False) for rows in (1, 8, 16)] == ["triton 64", "triton 64", "triton 128"]
    assert chosen(1, "float32") == "triton 16"

    monkeypatch.setattr(prefill_tiles, "is_hopper", lambda device: True)
    warn_once.cache_clear()
    for dtype, says in ((torch.bfloat16, 0), (torch.float32, 1), (torch.float32, 0)):
        caplog.clear()
        tiles = prefill_tiles.choose(layout, torch.empty(3, 8, dtype=dtype), 1)
        assert tiles.hopper == (dtype == torch.bfloat16)
        assert [record.getMessage().count("dtype=float32") for record in caplog.records] == [1] * says


@pytest.mark.parametrize(
    ("dtype", "dim", "chunk", "reason"),
    [
        ("bfloat16", 128, 64, None),
        ("float16", 64, 64, None),
        ("float32", 128, 16, "dtype=float32"),
        ("bfloat16", 256, 32, "key_dim=256"),
        ("bfloat16", 96, 64, "value_dim=96"),
        ("bfloat16", 128, 32, "chunk=32"),
    ],
)
def test_why_not_hopper(dtype, dim, chunk, reason):
    layout = Target(dtype, dim).layout
    found = why_not_hopper(layout, getattr(torch, dtype), Tiles(chunk, 64, 64, stages=3, state_warps=4))
    assert found == reason or (found is not None and reason is not None and reason in found)
