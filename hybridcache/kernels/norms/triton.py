"""Fused norms in Triton: what decoding is made of beside products, in one launch each. See ``naive`` for what they compute.

Shapes: T tokens, D hidden, H heads, E head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import power_of_2

HEADS_AT_ONCE = 8
"""Heads of one token that one program of the gated norm takes."""
GATED_ELEMENTS = 2048
"""Elements of one token that one program of the gate takes at most."""


@triton.jit
def add_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr,
    x_stride, delta_stride,
    DIM: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < DIM
    x = tl.load(x_ptr + token * x_stride + d, mask=inside, other=0.0)
    if ADD:
        delta = tl.load(delta_ptr + token * delta_stride + d, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * DIM + d, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / DIM + EPS)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * DIM + d, x * scale * (1.0 + weight), mask=inside)


@triton.jit
def gated_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr,
    x_stride_t, x_stride_h, gate_stride_t, gate_stride_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    inside = (head < HEADS)[:, None] & (e < DIM)[None, :]
    x = tl.load(x_ptr + token * x_stride_t + head[:, None] * x_stride_h + e[None, :], mask=inside, other=0.0)
    gate = tl.load(
        gate_ptr + token * gate_stride_t + head[:, None] * gate_stride_h + e[None, :], mask=inside, other=0.0
    )
    x, gate = x.to(tl.float32), gate.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPS)
    weight = tl.load(weight_ptr + e, mask=e < DIM, other=0.0).to(tl.float32)
    out = x * scale[:, None] * weight[None, :] * (gate / (1.0 + tl.exp(-gate)))
    tl.store(out_ptr + (token * HEADS + head[:, None]) * DIM + e[None, :], out, mask=inside)


@triton.jit
def sigmoid_mul_kernel(
    x_ptr, gate_ptr, out_ptr,
    x_stride_t, x_stride_h, gate_stride_t, gate_stride_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    inside = (head < HEADS)[:, None] & (e < DIM)[None, :]
    x = tl.load(x_ptr + token * x_stride_t + head[:, None] * x_stride_h + e[None, :], mask=inside, other=0.0)
    gate = tl.load(
        gate_ptr + token * gate_stride_t + head[:, None] * gate_stride_h + e[None, :], mask=inside, other=0.0
    )
    out = x.to(tl.float32) / (1.0 + tl.exp(-gate.to(tl.float32)))
    tl.store(out_ptr + (token * HEADS + head[:, None]) * DIM + e[None, :], out, mask=inside)


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :meth:`.LayerOperations.add_norm`. Not for float64; the last dimension has stride 1."""
    tokens, dim = x_TD.shape
    out_TD = torch.empty((tokens, dim), dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = x_TD if delta_TD is None else torch.empty_like(out_TD)
    if tokens:
        delta = x_TD if delta_TD is None else delta_TD
        block = power_of_2(dim)
        launcher(add_norm_kernel)[(tokens,)](
            x_TD, delta, weight_D, sum_TD, out_TD,
            x_TD.stride(0), delta.stride(0),
            DIM=dim, EPS=eps, ADD=delta_TD is not None, BLOCK_D=block, num_warps=min(max(block // 256, 1), 8),
        )  # fmt: skip
    return sum_TD, out_TD


def gated_norm(x_THE: Tensor, gate_THE: Tensor, weight_E: Tensor, eps: float, out_THE: Tensor) -> None:
    """See :meth:`.LayerOperations.gated_norm`. Not for float64; ``out`` is contiguous, the last dimension of
    the others has stride 1."""
    tokens, heads, dim = x_THE.shape
    if tokens:
        block_h = min(HEADS_AT_ONCE, power_of_2(heads))
        launcher(gated_norm_kernel)[(tokens, -(-heads // block_h))](
            x_THE, gate_THE, weight_E, out_THE,
            x_THE.stride(0), x_THE.stride(1), gate_THE.stride(0), gate_THE.stride(1),
            HEADS=heads, DIM=dim, EPS=eps, BLOCK_H=block_h, BLOCK_E=power_of_2(dim), num_warps=4,
        )  # fmt: skip


def sigmoid_mul(x_THE: Tensor, gate_THE: Tensor, out_THE: Tensor) -> None:
    """See :meth:`.LayerOperations.sigmoid_mul`. Not for float64; ``out`` is contiguous, the last dimension of
    the others has stride 1."""
    tokens, heads, dim = x_THE.shape
    if tokens:
        block_e = power_of_2(dim)
        block_h = min(max(GATED_ELEMENTS // block_e, 1), power_of_2(heads))
        launcher(sigmoid_mul_kernel)[(tokens, -(-heads // block_h))](
            x_THE, gate_THE, out_THE,
            x_THE.stride(0), x_THE.stride(1), gate_THE.stride(0), gate_THE.stride(1),
            HEADS=heads, DIM=dim, BLOCK_H=block_h, BLOCK_E=block_e, num_warps=4,
        )  # fmt: skip
