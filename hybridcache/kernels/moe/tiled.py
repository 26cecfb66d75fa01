"""Experts of any number of tokens in Triton: products of tiles of one expert's tokens, four launches in all.

``list`` notes which assignments each expert has. ``gate_up`` multiplies tiles of gathered rows of x with gate and up side by
side and writes ``silu(gate) * up``, times the routing weight; ``down`` multiplies those rows and writes each where its token's
sum reads it; ``combine`` adds up a token's rows in the order of its slots. An expert's matrices come through descriptors
(TMA), the rows of x and of what is between by address: nothing is copied into another order.

Sizes of experts stay on the device. The grid holds as many tiles as there can be, ``A / rows + E``; a program finds its
tile's expert by counting how many experts' tiles come before it, and those beyond the last tile do nothing. Which place an
assignment has in its expert's list is left to chance (an atomic count), but a row's result does not depend on it: results
are the same from run to run.

With few rows a tile, ``swap`` puts the matrix on the side of the product whose granularity is 64 and tokens on the other,
whose is 8.

Shapes: T tokens, D hidden, E experts, k experts per token, A = T * k assignments, I intermediate, J shared intermediate.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hybridcache.errors import bad
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.moe.silu_mul import silu_mul
from hybridcache.kernels.moe.tiles import Tiles, choose_tiles
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import power_of_2

LISTED_AT_ONCE = 512
"""Assignments of one program of the list kernel."""


@triton.jit(do_not_specialize=["assignments", "capacity"])
def moe_list_kernel(expert_ptr, count_ptr, list_ptr, assignments, capacity, BLOCK: tl.constexpr):
    """Row ``e`` of ``list [E, capacity]`` names the ``count[e]`` assignments of expert ``e``; ``count`` starts at 0."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = a < assignments
    expert = tl.load(expert_ptr + a, mask=inside, other=0)
    place = tl.atomic_add(count_ptr + expert, 1, mask=inside, sem="relaxed")
    tl.store(list_ptr + expert.to(tl.int64) * capacity + place, a, mask=inside)


@triton.jit
def find_tile(count_ptr, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr):
    """Expert of a tile and the tile's number among that expert's; the expert is ``EXPERTS`` beyond the last tile."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(count_ptr + e, mask=e < EXPERTS, other=0)
    tiles = (count + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    passed = (last <= tile) & (e < EXPERTS)
    expert = tl.sum(passed.to(tl.int32), 0)
    return expert, tile - tl.max(tl.where(passed, last, 0), 0)


@triton.jit
def multiply(a, b, acc, SWAP: tl.constexpr, DOT: tl.constexpr):
    """``acc + a b^T``, or with SWAP its transpose."""
    if SWAP:
        acc = tl.dot(b.to(DOT), a.to(DOT).T, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(DOT), b.to(DOT).T, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_tile(
    x_ptr, matrix_desc, weight_ptr, list_ptr, out_ptr, x_stride, rows, gate_row, column,
    ROWS: tl.constexpr, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    DIMS: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Up to ROWS assignments, listed from ``list_ptr`` on, times COLUMNS rows of gate and of up."""
    r = tl.arange(0, ROWS)
    inside = r < rows
    assignment = tl.load(list_ptr + r, mask=inside, other=0)
    d = tl.arange(0, DIMS)
    x_row = x_ptr + (assignment // TOP_K).to(tl.int64)[:, None] * x_stride + d[None, :]
    gate = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], dtype=tl.float32)
    for first in tl.range(0, HIDDEN, DIMS, num_stages=STAGES):
        # The matrices first: their copies need not wait for the list.
        gate_matrix = matrix_desc.load([gate_row + column, first])
        up_matrix = matrix_desc.load([gate_row + INNER + column, first])
        if HIDDEN % DIMS:
            x = tl.load(x_row + first, mask=inside[:, None] & (d < HIDDEN - first)[None, :], other=0.0)
        else:
            x = tl.load(x_row + first, mask=inside[:, None], other=0.0)
        gate = multiply(x, gate_matrix, gate, SWAP, DOT)
        up = multiply(x, up_matrix, up, SWAP, DOT)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if SWAP:
        out = out.T
    slot = assignment // TOP_K * (TOP_K + 1) + assignment % TOP_K
    out *= tl.load(weight_ptr + slot, mask=inside, other=0.0)[:, None]
    i = column + tl.arange(0, COLUMNS)
    at = out_ptr + assignment.to(tl.int64)[:, None] * INNER + i[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (i < INNER)[None, :])


@triton.jit
def down_tile(
    narrow_ptr, matrix_desc, list_ptr, out_ptr, rows, first_row, column,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    STAGES: tl.constexpr, SWAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Up to ROWS assignments, listed from ``list_ptr`` on, times COLUMNS rows of down."""
    r = tl.arange(0, ROWS)
    inside = r < rows
    assignment = tl.load(list_ptr + r, mask=inside, other=0)
    i = tl.arange(0, DIMS)
    row = narrow_ptr + assignment.to(tl.int64)[:, None] * INNER + i[None, :]
    acc = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], dtype=tl.float32)
    for first in tl.range(0, INNER, DIMS, num_stages=STAGES):
        matrix = matrix_desc.load([first_row + column, first])
        if INNER % DIMS:
            narrow = tl.load(row + first, mask=inside[:, None] & (i < INNER - first)[None, :], other=0.0)
        else:
            narrow = tl.load(row + first, mask=inside[:, None], other=0.0)
        acc = multiply(narrow, matrix, acc, SWAP, DOT)
    if SWAP:
        acc = acc.T
    d = column + tl.arange(0, COLUMNS)
    at = out_ptr + assignment.to(tl.int64)[:, None] * HIDDEN + d[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < HIDDEN)[None, :])


@triton.jit(do_not_specialize=["capacity"])
def moe_gate_up_tiles_kernel(
    x_ptr, matrix_desc, weight_ptr, count_ptr, list_ptr, tile_ptr, out_ptr,
    x_stride: tl.int64, capacity,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, STAGES: tl.constexpr,
    SWAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A program does some columns of one tile; that of the first columns notes the tile's expert (EXPERTS for none) and
    number for the second product. HALF is the size of tiles of fewer rows, ROWS where
    there is one size."""
    tile = tl.program_id(1)
    expert, number = find_tile(count_ptr, tile, EXPERTS, BLOCK_E, ROWS)
    if tl.program_id(0) == 0:
        tl.store(tile_ptr + 2 * tile, expert)
        tl.store(tile_ptr + 2 * tile + 1, number)
    if expert == EXPERTS:
        return
    rows = tl.minimum(tl.load(count_ptr + expert) - number * ROWS, ROWS)
    list_ptr += expert.to(tl.int64) * capacity + number * ROWS
    gate_row = expert * (2 * INNER)
    column = tl.program_id(0) * COLUMNS
    if rows <= HALF:
        gate_up_tile(
            x_ptr, matrix_desc, weight_ptr, list_ptr, out_ptr, x_stride, rows, gate_row, column,
            HALF, TOP_K, HIDDEN, INNER, COLUMNS, DIMS, STAGES, SWAP, DOT,
        )  # fmt: skip
    elif HALF < ROWS:
        gate_up_tile(
            x_ptr, matrix_desc, weight_ptr, list_ptr, out_ptr, x_stride, rows, gate_row, column,
            ROWS, TOP_K, HIDDEN, INNER, COLUMNS, DIMS, STAGES, SWAP, DOT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def moe_down_tiles_kernel(
    narrow_ptr, matrix_desc, count_ptr, list_ptr, tile_ptr, out_ptr, capacity,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    COLUMNS: tl.constexpr, DIMS: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """As :func:`moe_gate_up_tiles_kernel`, of the second product."""
    tile = tl.program_id(1)
    expert = tl.load(tile_ptr + 2 * tile)
    if expert == EXPERTS:
        return
    number = tl.load(tile_ptr + 2 * tile + 1)
    rows = tl.minimum(tl.load(count_ptr + expert) - number * ROWS, ROWS)
    list_ptr += expert.to(tl.int64) * capacity + number * ROWS
    first_row = expert * HIDDEN
    column = tl.program_id(0) * COLUMNS
    if rows <= HALF:
        down_tile(
            narrow_ptr, matrix_desc, list_ptr, out_ptr, rows, first_row, column,
            HALF, HIDDEN, INNER, COLUMNS, DIMS, STAGES, SWAP, DOT,
        )  # fmt: skip
    elif HALF < ROWS:
        down_tile(
            narrow_ptr, matrix_desc, list_ptr, out_ptr, rows, first_row, column,
            ROWS, HIDDEN, INNER, COLUMNS, DIMS, STAGES, SWAP, DOT,
        )  # fmt: skip


@triton.jit
def moe_sum_kernel(
    y_ptr, shared_ptr, weight_ptr, out_ptr, TOP_K: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of a token's rows ``y [T, k, D]`` in the order of its slots, and its gated shared expert."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < DIM
    gate = tl.load(weight_ptr + token * (TOP_K + 1) + TOP_K)
    acc = tl.load(shared_ptr + token * DIM + d, mask=inside, other=0.0).to(tl.float32) * gate
    y_ptr += token * (TOP_K * DIM) + d
    for slot in tl.static_range(TOP_K):
        acc += tl.load(y_ptr + slot * DIM, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * DIM + d, acc, mask=inside)


@lru_cache
def constants(
    experts: int, hidden: int, inner: int, k: int, dtype: torch.dtype, tiles: Tiles
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Compile-time parameters of the two products' kernels."""
    # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
    dot = tl.float32 if interpreting() or dtype == torch.float32 else tl.bfloat16
    half = tiles.rows // 2 if tiles.rows > 64 else tiles.rows
    shared = {"EXPERTS": experts, "ROWS": tiles.rows, "HALF": half, "HIDDEN": hidden, "INNER": inner}
    shared |= {"SWAP": tiles.swap, "DOT": dot}
    cuts = [{"COLUMNS": p.columns, "DIMS": p.dims, "STAGES": p.stages} for p in (tiles.gate_up, tiles.down)]
    gate_up = {**shared, **cuts[0], "TOP_K": k, "BLOCK_E": power_of_2(experts)}
    return MappingProxyType(gate_up), MappingProxyType({**shared, **cuts[1]})


def mixture(
    x_TD: Tensor, weight_Ts: Tensor, expert_Tk: Tensor, gate_up_EID: Tensor, down_EDI: Tensor,
    shared_gate_up_JD: Tensor, shared_down_DJ: Tensor, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`.LayerOperations.mixture`. bfloat16 or float32; weights are float32, rows of the matrices
    are multiples of 16 bytes.

    Raises:
        UserError: another dtype.
    """
    if x_TD.dtype not in (torch.bfloat16, torch.float32):
        raise bad("dtype", str(x_TD.dtype), "experts in tiles take bfloat16 or float32")
    y_TkD = routed(x_TD, weight_Ts, expert_Tk, gate_up_EID, down_EDI, tiles)
    shared_TD = F.linear(silu_mul(F.linear(x_TD, shared_gate_up_JD)), shared_down_DJ)
    tokens, k, hidden = y_TkD.shape
    out_TD = torch.empty_like(shared_TD)
    block = min(power_of_2(hidden), 1024)
    launcher(moe_sum_kernel)[(tokens, -(-hidden // block))](
        y_TkD, shared_TD, weight_Ts, out_TD, TOP_K=k, DIM=hidden, BLOCK_D=block, num_warps=4
    )
    return out_TD


def routed(
    x_TD: Tensor, weight_Ts: Tensor, expert_Tk: Tensor, gate_up_EID: Tensor, down_EDI: Tensor,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """Every assignment's weighted result, ``[T, k, D]``."""
    (tokens, k), (experts, hidden, inner) = expert_Tk.shape, down_EDI.shape
    assignments, device = tokens * k, x_TD.device
    tiles = tiles or choose_tiles(assignments, experts)
    gate_up, down = tiles.gate_up, tiles.down
    gate_up_constants, down_constants = constants(experts, hidden, inner, k, x_TD.dtype, tiles)
    tile_count = assignments // tiles.rows + min(experts, assignments)
    count_E = torch.zeros(experts, dtype=torch.int32, device=device)
    list_ET = torch.empty((experts, tokens), dtype=torch.int32, device=device)
    tile_M2 = torch.empty((tile_count, 2), dtype=torch.int32, device=device)
    narrow_AI = torch.empty((assignments, inner), dtype=x_TD.dtype, device=device)
    y_TkD = torch.empty((tokens, k, hidden), dtype=x_TD.dtype, device=device)
    launcher(moe_list_kernel)[(-(-assignments // LISTED_AT_ONCE),)](
        expert_Tk, count_E, list_ET, assignments, tokens, BLOCK=LISTED_AT_ONCE, num_warps=4
    )
    launcher(moe_gate_up_tiles_kernel)[(-(-inner // gate_up.columns), tile_count)](
        x_TD, TensorDescriptor.from_tensor(gate_up_EID.flatten(0, 1), [gate_up.columns, gate_up.dims]), weight_Ts,
        count_E, list_ET, tile_M2, narrow_AI, x_TD.stride(0), tokens,
        **gate_up_constants, num_warps=gate_up.warps,
    )  # fmt: skip
    launcher(moe_down_tiles_kernel)[(-(-hidden // down.columns), tile_count)](
        narrow_AI, TensorDescriptor.from_tensor(down_EDI.flatten(0, 1), [down.columns, down.dims]), count_E, list_ET,
        tile_M2, y_TkD, tokens,
        **down_constants, num_warps=down.warps,
    )  # fmt: skip
    return y_TkD
