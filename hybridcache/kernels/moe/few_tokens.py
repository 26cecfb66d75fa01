"""Experts of few tokens in Triton: two launches, each a product of gathered matrix rows with one token's vector.

With few tokens nearly every assignment has an expert to itself, so that time is what it takes to read the experts' matrices,
once per assignment. ``gate_up`` has a program for a few rows of gate and up of one assignment, ``down`` a program for a few
output dims of one token, which sums over the token's experts in order. The shared expert is the last slot of every token.

Shapes: T tokens, D hidden, E experts, k experts per token, s = k + 1 slots, I intermediate of every expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import power_of_2

MAX_TOKENS = 8
"""Tokens up to which this is used: from there on products in tiles, which read an expert once, are faster."""


@dataclass(frozen=True)
class Tiles:
    """How the two launches are cut."""

    gate_rows: int = 4
    """Rows of gate, and of up, of one program."""
    gate_dims: int = 512
    """Hidden dims at a time."""
    gate_warps: int = 4
    down_rows: int = 4
    """Output dims of one program."""
    down_warps: int = 2


@triton.jit
def moe_gate_up_kernel(
    x_ptr, expert_ptr, gate_up_ptr, shared_ptr, out_ptr,
    x_stride,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``silu(gate x) * (up x)`` of one assignment into ``out [T, s, I]`` (float32)."""
    assignment = tl.program_id(1).to(tl.int64)
    token, slot = assignment // (TOP_K + 1), assignment % (TOP_K + 1)
    matrix = shared_ptr
    if slot < TOP_K:
        expert = tl.load(expert_ptr + token * TOP_K + slot).to(tl.int64)
        matrix = gate_up_ptr + expert * (2 * INNER * HIDDEN)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    i_inside = i < INNER
    gate = tl.zeros([BLOCK_I, BLOCK_D], dtype=tl.float32)
    up = tl.zeros([BLOCK_I, BLOCK_D], dtype=tl.float32)
    x_ptr += token * x_stride
    row = matrix + i[:, None] * HIDDEN + d[None, :]
    for first in tl.static_range(0, HIDDEN, BLOCK_D):
        d_inside = d < HIDDEN - first
        inside = i_inside[:, None] & d_inside[None, :]
        x = tl.load(x_ptr + first + d, mask=d_inside, other=0.0).to(tl.float32)
        gate += tl.load(row + first, mask=inside, other=0.0).to(tl.float32) * x[None, :]
        up += tl.load(row + (INNER * HIDDEN + first), mask=inside, other=0.0).to(tl.float32) * x[None, :]
    gate_I, up_I = tl.sum(gate, 1), tl.sum(up, 1)
    tl.store(out_ptr + assignment * INNER + i, gate_I / (1.0 + tl.exp(-gate_I)) * up_I, mask=i_inside)


@triton.jit
def moe_down_kernel(
    narrow_ptr, weight_ptr, expert_ptr, down_ptr, shared_ptr, out_ptr,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """``sum over slots of weight * (down narrow)`` of one token."""
    token = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_I)
    d_inside, i_inside = d < HIDDEN, i < INNER
    inside = d_inside[:, None] & i_inside[None, :]
    row = d[:, None] * INNER + i[None, :]
    acc = tl.zeros([BLOCK_D, BLOCK_I], dtype=tl.float32)
    for slot in tl.static_range(TOP_K + 1):
        matrix = shared_ptr
        if slot < TOP_K:
            expert = tl.load(expert_ptr + token * TOP_K + slot).to(tl.int64)
            matrix = down_ptr + expert * (HIDDEN * INNER)
        weight = tl.load(weight_ptr + token * (TOP_K + 1) + slot)
        narrow = tl.load(narrow_ptr + (token * (TOP_K + 1) + slot) * INNER + i, mask=i_inside, other=0.0)
        acc += tl.load(matrix + row, mask=inside, other=0.0).to(tl.float32) * (narrow * weight)[None, :]
    tl.store(out_ptr + token * HIDDEN + d, tl.sum(acc, 1), mask=d_inside)


def constants(hidden: int, inner: int, k: int, tiles: Tiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time parameters of the two kernels."""
    shape = {"TOP_K": k, "HIDDEN": hidden, "INNER": inner}
    return (
        {**shape, "BLOCK_I": tiles.gate_rows, "BLOCK_D": min(tiles.gate_dims, power_of_2(hidden))},
        {**shape, "BLOCK_D": tiles.down_rows, "BLOCK_I": power_of_2(inner)},
    )


def mixture(
    x_TD: Tensor, weight_Ts: Tensor, expert_Tk: Tensor, gate_up_EID: Tensor, down_EDI: Tensor,
    shared_gate_up_ID: Tensor, shared_down_DI: Tensor, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`.LayerOperations.mixture`; the shared expert is as wide as the others. Not for float64."""
    tokens, hidden = x_TD.shape
    k, inner = expert_Tk.shape[1], down_EDI.shape[2]
    tiles = tiles or Tiles()
    gate_constants, down_constants = constants(hidden, inner, k, tiles)
    narrow = torch.empty((tokens, k + 1, inner), dtype=torch.float32, device=x_TD.device)
    out_TD = torch.empty((tokens, hidden), dtype=x_TD.dtype, device=x_TD.device)
    launcher(moe_gate_up_kernel)[(-(-inner // tiles.gate_rows), tokens * (k + 1))](
        x_TD, expert_Tk, gate_up_EID, shared_gate_up_ID, narrow,
        x_TD.stride(0),
        **gate_constants, num_warps=tiles.gate_warps,
    )  # fmt: skip
    launcher(moe_down_kernel)[(-(-hidden // tiles.down_rows), tokens)](
        narrow, weight_Ts, expert_Tk, down_EDI, shared_down_DI, out_TD, **down_constants, num_warps=tiles.down_warps
    )
    return out_TD
