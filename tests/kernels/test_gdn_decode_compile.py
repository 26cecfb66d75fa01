"""GDN decode compiled for Hopper without a GPU: what its speed rests on is visible in the assembler's output."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper, ptxas_report  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from hybridcache.kernels.gdn_decode import hopper  # noqa: E402
from hybridcache.kernels.gdn_decode.tiles import SharedTiles, Tiles  # noqa: E402
from hybridcache.kernels.gdn_decode.triton import constants, gdn_decode_kernel, options  # noqa: E402
from hybridcache.kernels.testing import state_case  # noqa: E402


def pointer_types(state_dtype: str) -> dict[str, str]:
    activations = ("x_ptr", "weight_ptr", "a_ptr", "b_ptr", "out_ptr", "ring_ptr")
    return {
        "state_ptr": "*" + TRITON_TYPE[state_dtype],
        **dict.fromkeys(activations, "*bf16"),
        **dict.fromkeys(("a_log_ptr", "dt_bias_ptr"), "*fp32"),
        **dict.fromkeys(("read_ptr", "write_ptr"), "*i32"),
        "position_ptr": "*i64",
    }


def compiled_for(state_dtype: str, tiles: Tiles, weight_by_column: bool = False):
    layout = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype=state_dtype).layout
    pointers = pointer_types(state_dtype)
    weight_strides = (1, layout.conv_channels) if weight_by_column else None
    constant = constants(layout, torch.bfloat16, tiles, weight_strides)
    return compile_for_hopper(gdn_decode_kernel, pointers, {"layer": "i32"}, constant, options(tiles))


@pytest.mark.parametrize("conv_first", [False, True], ids=["state-first", "conv-first"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block_v", "num_warps"), [(16, 1), (32, 1), (32, 2), (64, 2), (128, 4)])
def test_tiles_fit_and_load_before_they_wait(block_v, num_warps, state_dtype, conv_first, tmp_path):
    compiled = compiled_for(state_dtype, Tiles(block_v, num_warps, conv_first=conv_first), weight_by_column=conv_first)
    assert_fits(compiled, tmp_path)
    parts = re.split(r"bar\.(?:warp\.)?sync", compiled.asm["ptx"])
    vectors = len(re.findall(r"ld\.global\.v4\.b32", parts[0]))
    tile_bytes = 128 * block_v * (4 if state_dtype == "float32" else 2)
    state_vectors = tile_bytes // (16 * 32 * num_warps)
    # The conv's own may be as wide.
    assert vectors >= state_vectors if conv_first else vectors == state_vectors, (
        "the state's loads are not 16 bytes wide"
    )
    assert all("ld.global" not in part for part in parts[1 if conv_first else 2 :]), "a load behind the barrier"


def test_options_reach_the_assembler(tmp_path):
    tiles = Tiles(16, 1, evict_first=True, max_registers=160, dependent_launch=True)
    compiled = compiled_for("float32", tiles, weight_by_column=True)
    assert_fits(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    assert "L2::evict_first" in ptx
    assert ".maxnreg 160" in ptx
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


def staged_for(state_dtype: str, tiles: SharedTiles, weight_by_column: bool = False):
    """As the launcher would compile it for aligned arguments."""
    layout = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype=state_dtype).layout
    constant = hopper.constants(layout, tiles, (1, layout.conv_channels) if weight_by_column else None)
    types = {**pointer_types(state_dtype), "layer": "i32"}
    kernel = hopper.shared_decode_kernel
    signature, aligned = {}, {}
    for index, param in enumerate(kernel.params):
        is_constant = param.name in constant
        signature[param.name] = "constexpr" if is_constant else types.get(param.name) or param.annotation_type
        if not (is_constant or param.name == "layer" or param.do_not_specialize_on_alignment):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constexprs=constant, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.num_warps})


@pytest.mark.parametrize("weight_by_column", [False, True], ids=["CW", "WC"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("block_v", "num_warps", "chunks"), [(128, 4, 1), (128, 4, 4), (128, 4, 8), (64, 4, 1), (64, 2, 1)]
)
def test_shared_tiles_fit_and_copy_before_they_wait(
    block_v, num_warps, chunks, state_dtype, weight_by_column, tmp_path
):
    tiles = SharedTiles(block_v, num_warps, chunks, dependent_launch=True)
    compiled = staged_for(state_dtype, tiles, weight_by_column)
    assert_fits(compiled, tmp_path)
    ptx = compiled.asm["ptx"]
    copies = [match.start() for match in re.finditer(r"cp\.async\.cg\.shared\.global", ptx)]
    tile_bytes = 128 * block_v * (4 if state_dtype == "float32" else 2)
    assert len(copies) * 16 * 32 * num_warps == tile_bytes, "a copy is not 16 bytes wide"
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global"), "a read before the kernel ahead has ended"
    if chunks == 1:  # several get barriers between them, since they share an allocation
        assert copies[-1] < ptx.index("bar.sync"), "a barrier holds copies back"
    last_load = max(match.start() for match in re.finditer(r"ld\.global", ptx))
    assert last_load < copies[0], "the conv's loads queue behind the state's"
    assert re.search(r"ld\.global\.v[24]", ptx), "the conv's loads are no vectors"
    programs = min(resident_programs(compiled, tmp_path), 233_472 // (compiled.metadata.shared + 1_024))
    assert programs * tile_bytes >= (192 if block_v == 128 else 144) * 1_024, "too few bytes of state at a time"


def resident_programs(compiled, tmp_path) -> int:
    """On a multiprocessor, as its registers allow; they are given out to a warp in units of 256."""
    registers = int(re.search(r"Used (\d+) registers", ptxas_report(compiled, tmp_path)).group(1))
    warps = compiled.metadata.num_warps
    return 65_536 // (-(-registers * 32 // 256) * 256 * warps)
