"""Routing, experts, norms and greedy choice compiled for Hopper without a GPU: nothing spills, matrices are read 16 B wide."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from test_kernels_compile import assert_fits, compile_for_hopper, ptxas_report  # noqa: E402

from hybridcache.kernels.greedy import NOT_FINITE  # noqa: E402
from hybridcache.kernels.greedy import triton as greedy  # noqa: E402
from hybridcache.kernels.moe import few_tokens, routing, silu_mul, tiled  # noqa: E402
from hybridcache.kernels.moe import tiles as moe_tiles  # noqa: E402
from hybridcache.kernels.norms import triton as norms  # noqa: E402

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 512, 512, 10
TILES = [
    few_tokens.Tiles(),
    few_tokens.Tiles(gate_rows=4, gate_dims=1024, gate_warps=4, down_rows=4, down_warps=2),
    few_tokens.Tiles(gate_rows=16, gate_dims=256, gate_warps=4, down_rows=16, down_warps=8),
]


def wide_loads(compiled) -> int:
    return len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", compiled.asm["ptx"]))


@pytest.mark.parametrize("tiles", TILES)
def test_few_tokens(tiles, tmp_path):
    gate_constants, down_constants = few_tokens.constants(HIDDEN, INNER, TOP_K, tiles)
    matrices = {"gate_up_ptr": "*bf16", "down_ptr": "*bf16", "shared_ptr": "*bf16"}
    pointers = {**matrices, "x_ptr": "*bf16", "expert_ptr": "*i32", "out_ptr": "*fp32"}
    compiled = compile_for_hopper(
        few_tokens.moe_gate_up_kernel, pointers, {"x_stride": "i32"}, gate_constants, {"num_warps": tiles.gate_warps}
    )
    assert_fits(compiled, tmp_path)
    tile_bytes = 2 * 2 * tiles.gate_rows * HIDDEN
    assert wide_loads(compiled) >= tile_bytes // (16 * 32 * tiles.gate_warps)
    pointers = {**matrices, "narrow_ptr": "*fp32", "weight_ptr": "*fp32", "expert_ptr": "*i32", "out_ptr": "*bf16"}
    compiled = compile_for_hopper(
        few_tokens.moe_down_kernel, pointers, {}, down_constants, {"num_warps": tiles.down_warps}
    )
    assert_fits(compiled, tmp_path)
    tile_bytes = 2 * tiles.down_rows * INNER * (TOP_K + 1)
    assert wide_loads(compiled) >= tile_bytes // (16 * 32 * tiles.down_warps)


def test_routing(tmp_path):
    pointers = {"logits_ptr": "*bf16", "weight_ptr": "*fp32", "expert_ptr": "*i32"}
    constants = {"EXPERTS": EXPERTS, "TOP_K": TOP_K, "RENORMALISE": True, "BLOCK_E": 512, "BLOCK_K": 16}
    options = {"num_warps": 1}
    assert_fits(
        compile_for_hopper(routing.moe_route_kernel, pointers, {"logits_stride": "i32"}, constants, options), tmp_path
    )


def test_silu_mul(tmp_path):
    constants = {"INNER": INNER, "BLOCK_R": 4, "BLOCK_I": 512}
    pointers = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}
    kernel = silu_mul.moe_silu_mul_kernel
    assert_fits(compile_for_hopper(kernel, pointers, {"rows": "i32"}, constants, {"num_warps": 4}), tmp_path)


@pytest.mark.parametrize("name", moe_tiles.TILES)
def test_tiles(name, tmp_path):
    """All tiles that are timed: products on the matrix unit, matrices by descriptor, gathered rows copied in the
    background, all of it in a pipeline."""
    tiles = moe_tiles.TILES[name]
    both = tiled.constants(EXPERTS, HIDDEN, INNER, TOP_K, torch.bfloat16, tiles)
    kernels = (tiled.moe_gate_up_tiles_kernel, tiled.moe_down_tiles_kernel)
    pointers = dict.fromkeys(("x_ptr", "narrow_ptr", "out_ptr"), "*bf16") | {"weight_ptr": "*fp32"}
    pointers |= dict.fromkeys(("count_ptr", "list_ptr", "tile_ptr"), "*i32")
    for kernel, constants, product in zip(kernels, both, (tiles.gate_up, tiles.down)):
        scalars = {"capacity": "i32", "matrix_desc": f"tensordesc<bf16[{product.columns}, {product.dims}]>"}
        compiled = compile_for_hopper(kernel, pointers, scalars, constants, {"num_warps": product.warps})
        assert_fits(compiled, tmp_path)
        ptx = compiled.asm["ptx"]
        assert "wgmma.mma_async" in ptx or tiles.rows == 16
        assert "serialized" not in ptxas_report(compiled, tmp_path)
        assert ptx.count("cp.async.bulk.tensor") >= product.stages
        assert re.search(r"cp\.async\.c[ga]\.shared\.global", ptx), "rows are not copied in the background"


def test_lists_and_sums_of_tiles(tmp_path):
    pointers = dict.fromkeys(("expert_ptr", "count_ptr", "list_ptr"), "*i32")
    pointers |= dict.fromkeys(("y_ptr", "shared_ptr", "out_ptr"), "*bf16") | {"weight_ptr": "*fp32"}
    scalars = dict.fromkeys(("assignments", "capacity"), "i32")
    for kernel, constants in (
        (tiled.moe_list_kernel, {"BLOCK": tiled.LISTED_AT_ONCE}),
        (tiled.moe_sum_kernel, {"TOP_K": TOP_K, "DIM": HIDDEN, "BLOCK_D": 1024}),
    ):
        assert_fits(compile_for_hopper(kernel, pointers, scalars, constants, {"num_warps": 4}), tmp_path)


def test_norms(tmp_path):
    pointers = dict.fromkeys(("x_ptr", "delta_ptr", "gate_ptr", "sum_ptr", "out_ptr"), "*bf16") | {
        "weight_ptr": "*fp32"
    }
    names = ("x_stride", "delta_stride", "x_stride_t", "x_stride_h", "gate_stride_t", "gate_stride_h")
    scalars = dict.fromkeys(names, "i32")
    added = {"DIM": HIDDEN, "EPS": 1e-6, "ADD": True, "BLOCK_D": 2048}
    gated = {"HEADS": 32, "DIM": 128, "EPS": 1e-6, "BLOCK_H": 8, "BLOCK_E": 128}
    heads = {"HEADS": 16, "DIM": 256, "BLOCK_H": 8, "BLOCK_E": 256}
    for kernel, constants, warps in (
        (norms.add_norm_kernel, added, 8),
        (norms.gated_norm_kernel, gated, 4),
        (norms.sigmoid_mul_kernel, heads, 4),
    ):
        assert_fits(compile_for_hopper(kernel, pointers, scalars, constants, {"num_warps": warps}), tmp_path)


def test_greedy(tmp_path):
    pointers = {"logits_ptr": "*bf16", "value_ptr": "*fp32", "index_ptr": "*i32", "id_ptr": "*i64", "feed_ptr": "*i64"}
    scalars = dict.fromkeys(("stride", "vocabulary", "parts"), "i32")
    for kernel, constants, warps in (
        (greedy.sample_part_kernel, {"BLOCK": greedy.PART}, 4),
        (greedy.sample_best_kernel, {"NONE": NOT_FINITE, "BLOCK": 64}, 1),
    ):
        assert_fits(compile_for_hopper(kernel, pointers, scalars, constants, {"num_warps": warps}), tmp_path)
