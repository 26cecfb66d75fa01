"""GDN decode compiled for Hopper without a GPU: what its speed rests on is visible in the assembler's output."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from test_kernels_compile import TRITON_TYPE, assert_fits, compile_for_hopper  # noqa: E402

from hybridcache.kernels.gdn_decode.triton import Tuning, constants, gdn_decode_kernel, options  # noqa: E402
from hybridcache.kernels.testing import state_case  # noqa: E402


def compiled_for(state_dtype: str, tuning: Tuning, weight_by_column: bool = False):
    layout = state_case(torch.Generator(), positions=[-1], layers=1, state_dtype=state_dtype).layout
    activations = ("x_ptr", "weight_ptr", "a_ptr", "b_ptr", "out_ptr", "ring_ptr")
    pointers = {
        "state_ptr": "*" + TRITON_TYPE[state_dtype],
        **dict.fromkeys(activations, "*bf16"),
        **dict.fromkeys(("a_log_ptr", "dt_bias_ptr"), "*fp32"),
        "table_ptr": "*i32",
        "position_ptr": "*i64",
    }
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
