"""GDN decode compiled for Hopper without a GPU: what its speed rests on is visible in the assembler's output."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper, ptxas_report  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from hybridcache.kernels.gdn_decode import hopper  # noqa: E402
from hybridcache.kernels.gdn_decode.staging import Staging  # noqa: E402
from hybridcache.kernels.gdn_decode.triton import Tuning, constants, gdn_decode_kernel, options  # noqa: E402
from hybridcache.kernels.testing import state_case  # noqa: E402


def pointer_types(state_dtype: str) -> dict[str, str]:
    activations = ("x_ptr", "weight_ptr", "a_ptr", "b_ptr", "out_ptr", "ring_ptr")
    return {
        "state_ptr": "*" + TRITON_TYPE[state_dtype],
        **dict.fromkeys(activations, "*bf16"),
        **dict.fromkeys(("a_log_ptr", "dt_bias_ptr"), "*fp32"),
        "table_ptr": "*i32",
        "position_ptr": "*i64",
    }


def compiled_for(state_dtype: str, tuning: Tuning, weight_by_column: bool = False):
    layout = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype=state_dtype).layout
    pointers = pointer_types(state_dtype)
    weight_strides = (1, layout.conv_channels) if weight_by_column else None
    constant = constants(layout, torch.bfloat16, tuning, weight_strides)
    return compile_for_hopper(gdn_decode_kernel, pointers, {"layer": "i32"}, constant, options(tuning))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block_v", "num_warps"), [(8, 1), (16, 1), (32, 1), (32, 2), (64, 2), (128, 4)])
def test_tunings_fit_and_load_the_state_first(state_dtype, block_v, num_warps, tmp_path):
    compiled = compiled_for(state_dtype, Tuning(block_v, num_warps))
    assert_fits(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    before_barrier = ptx[: ptx.index("bar.sync")] if "bar.sync" in ptx else ptx[: ptx.index("bar.warp.sync")]
    vectors = len(re.findall(r"ld\.global\.v4\.b32", before_barrier))
    tile_bytes = 128 * block_v * (4 if state_dtype == "float32" else 2)
    assert vectors * 16 * 32 * num_warps == tile_bytes, "the state's loads are not 16 bytes wide, or not the first"


def test_options_reach_the_assembler(tmp_path):
    tuning = Tuning(16, 1, evict_first=True, max_registers=160, dependent_launch=True)
    compiled = compiled_for("float32", tuning, weight_by_column=True)
    assert_fits(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    assert "L2::evict_first" in ptx
    assert ".maxnreg 160" in ptx
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


@pytest.mark.parametrize(
    ("tuning", "warps"),
    [(Tuning(32, 1, max_registers=144, packed=True), 14), (Tuning(64, 2, max_registers=168, packed=True), 12)],
)
def test_packed_states_leave_room_for_more_warps(tuning, warps, tmp_path):
    """Against 9 and 8 of the tilings that widen the state at once."""
    compiled = compiled_for("bfloat16", tuning)
    assert_fits(compiled, tmp_path)
    assert resident_warps(compiled, tmp_path) >= warps


def staged_for(state_dtype: str, staging: Staging):
    """As the launcher would compile it for aligned arguments."""
    layout = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype=state_dtype).layout
    constant = hopper.constants(layout, staging)
    types = {**pointer_types(state_dtype), "layer": "i32"}
    if staging.bulk:
        block = f"{TRITON_TYPE[state_dtype]}[{128 // staging.chunks}, {staging.block_v}]"
        types["state_desc"] = f"tensordesc<{block},{hopper.staged_layout(getattr(gl, state_dtype), True)!r}>"
    else:
        constant["state_desc"] = None
    kernel = hopper.shared_decode_kernel
    signature, aligned = {}, {}
    for index, param in enumerate(kernel.params):
        is_constant = param.name in constant
        signature[param.name] = "constexpr" if is_constant else types.get(param.name) or param.annotation_type
        if not (is_constant or param.name in ("layer", "state_desc") or param.do_not_specialize_on_alignment):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constexprs=constant, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": staging.num_warps})


STAGINGS = [
    *(Staging(*cut) for cut in ((128, 4), (128, 8), (64, 4), (64, 2), (32, 2), (32, 1))),
    *(Staging(128, 4, chunks=chunks) for chunks in (1, 8)),
    *(Staging(128, warps, heads=2, dependent_launch=True) for warps in (4, 8)),
    *(Staging(*cut, bulk=True) for cut in ((128, 4), (128, 8), (64, 4))),
    Staging(128, 4, heads=2, bulk=True),
]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "staging", STAGINGS, ids=lambda s: f"v{s.block_v}-w{s.num_warps}-c{s.chunks}-h{s.heads}{'-bulk' * s.bulk}"
)
def test_stagings_fit_and_copy_the_state_first(state_dtype, staging, tmp_path):
    compiled = staged_for(state_dtype, staging)
    assert_fits(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    tiles = staging.heads * staging.chunks
    if staging.bulk:
        assert ptx.count("cp.async.bulk.tensor.2d.shared") == tiles, "a chunk is not one bulk copy"
        assert ptx.count("cp.async.bulk.tensor.2d.global") == tiles
        return
    copies = [match.start() for match in re.finditer(r"cp\.async\.cg\.shared\.global", ptx)]
    tile_bytes = 128 * staging.block_v * (4 if state_dtype == "float32" else 2) * staging.heads
    assert len(copies) * 16 * 32 * staging.num_warps == tile_bytes, "a copy is not 16 bytes wide"
    assert copies[-1] < ptx.index("ld.global.v2"), "the conv's loads come first"
    resident = 233_472 // (compiled.metadata.shared + 1_024) * tile_bytes
    assert resident >= 96 * 1_024, "too few bytes of state on a multiprocessor at a time"


def resident_warps(compiled, tmp_path) -> int:
    """Of a multiprocessor, as its registers allow; they are given out to a warp in units of 256."""
    registers = int(re.search(r"Used (\d+) registers", ptxas_report(compiled, tmp_path)).group(1))
    warps = compiled.metadata.num_warps
    return 65_536 // (-(-registers * 32 // 256) * 256 * warps) * warps
