"""GDN decode in Triton: conv, SiLU, q/k l2norm, gates, delta rule and both state updates in one launch.

A program owns one tile of value dims of one value head of one row: it reads and writes its part of the recurrent state once.
It recomputes the conv of its key head's q and k. That is safe while other programs update the ring: a step at position
``p`` reads the columns of ``p - W + 1 .. p - 1`` and writes column ``p % W`` only, and every channel of that column has one
writer (q and k: the first tile of the first value head of the key head).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hybridcache.dtypes import torch_dtype
from hybridcache.kernels.gdn_decode import L2NORM_EPS
from hybridcache.kernels.memory import elements
from hybridcache.layout import StateLayout

VALUE_TILE = 32
"""Value dims of one program at most; a tuning choice, independent of the head's width."""


@triton.jit
def conv_step(
    x_ptr,
    weight_ptr,
    ring_ptr,
    channel,
    inside,
    writes,
    position,
    weight_stride_c,
    weight_stride_w,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """Causal depthwise conv and SiLU of some channels; writes their inputs to the ring where ``writes``."""
    weight = weight_ptr + channel * weight_stride_c
    x = tl.load(x_ptr + channel, mask=inside, other=0.0)
    acc = x.to(ACC) * tl.load(weight + (WIDTH - 1) * weight_stride_w, mask=inside, other=0.0).to(ACC)
    for back in tl.static_range(1, WIDTH):
        # Column of position - back. WIDTH keeps the dividend positive; positions before the first are masked, not read.
        column = (position + WIDTH - back) % WIDTH
        seen = inside & (position >= back)
        past = tl.load(ring_ptr + column * CHANNELS + channel, mask=seen, other=0.0).to(ACC)
        acc += past * tl.load(weight + (WIDTH - 1 - back) * weight_stride_w, mask=inside, other=0.0).to(ACC)
    tl.store(ring_ptr + (position % WIDTH) * CHANNELS + channel, x, mask=inside & writes)
    return acc / (1.0 + tl.exp(-acc))


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["a_ptr", "b_ptr", "table_ptr", "position_ptr"])
def gdn_decode_kernel(
    state_ptr,
    ring_ptr,
    x_ptr,
    weight_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    table_ptr,
    position_ptr,
    out_ptr,
    layer,
    x_stride: tl.int64,
    weight_stride_c: tl.int64,
    weight_stride_w: tl.int64,
    a_stride: tl.int64,
    b_stride: tl.int64,
    table_stride: tl.int64,
    state_base: tl.int64,
    state_stride: tl.int64,
    ring_base: tl.int64,
    ring_stride: tl.int64,
    V_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    j = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    j_inside = j < VALUE_DIM
    out = out_ptr + (row * V_HEADS + head) * VALUE_DIM + j

    entry = tl.load(table_ptr + row * table_stride + layer).to(tl.int64)
    if entry < 0:
        tl.store(out, tl.zeros([BLOCK_V], dtype=out_ptr.dtype.element_ty), mask=j_inside)
        return
    position = tl.load(position_ptr + row).to(tl.int32)
    state_ptr += state_base + entry * state_stride
    ring_ptr += ring_base + entry * ring_stride

    i = tl.arange(0, BLOCK_K)
    i_inside = i < KEY_DIM
    tile_offset = head * (KEY_DIM * VALUE_DIM) + i[:, None] * VALUE_DIM + j[None, :]
    tile_inside = i_inside[:, None] & j_inside[None, :]
    state = tl.load(state_ptr + tile_offset, mask=tile_inside & (position > 0), other=0.0).to(ACC)

    x_ptr += row * x_stride
    key_head = head // GROUP
    K_CHANNELS: tl.constexpr = (V_HEADS // GROUP) * KEY_DIM
    writes_qk = (tile == 0) & (head % GROUP == 0)
    q_channel = key_head * KEY_DIM + i
    v_channel = 2 * K_CHANNELS + head * VALUE_DIM + j
    q = conv_step(
        x_ptr, weight_ptr, ring_ptr, q_channel, i_inside, writes_qk, position, weight_stride_c, weight_stride_w,
        CHANNELS, WIDTH, ACC,
    )  # fmt: skip
    k = conv_step(
        x_ptr, weight_ptr, ring_ptr, K_CHANNELS + q_channel, i_inside, writes_qk, position, weight_stride_c,
        weight_stride_w, CHANNELS, WIDTH, ACC,
    )  # fmt: skip
    v = conv_step(
        x_ptr, weight_ptr, ring_ptr, v_channel, j_inside, True, position, weight_stride_c, weight_stride_w,
        CHANNELS, WIDTH, ACC,
    )  # fmt: skip
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * SCALE
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)

    a = tl.load(a_ptr + row * a_stride + head).to(ACC) + tl.load(dt_bias_ptr + head).to(ACC)
    softplus = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    decay = tl.exp(-tl.exp(tl.load(a_log_ptr + head).to(ACC)) * softplus)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b_ptr + row * b_stride + head).to(ACC)))

    state *= decay
    delta = (v - tl.sum(state * k[:, None], 0)) * beta
    state += k[:, None] * delta[None, :]
    tl.store(out, tl.sum(state * q[:, None], 0), mask=j_inside)
    tl.store(state_ptr + tile_offset, state, mask=tile_inside)


def constants(layout: StateLayout, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time parameters of :func:`gdn_decode_kernel` for a layout and an activation dtype."""
    v_heads, key_dim, value_dim = layout.recurrent_shape
    k_heads = (layout.conv_channels - v_heads * value_dim) // (2 * key_dim)
    return {
        "V_HEADS": v_heads,
        "GROUP": v_heads // k_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "CHANNELS": layout.conv_channels,
        "WIDTH": layout.conv_kernel,
        "BLOCK_K": triton.next_power_of_2(key_dim),
        "BLOCK_V": min(triton.next_power_of_2(value_dim), VALUE_TILE),
        "SCALE": key_dim**-0.5,
        "EPS": L2NORM_EPS,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def options() -> dict[str, Any]:
    """Launch options."""
    return {"num_warps": 4}


def gdn_decode(
    buffer: torch.Tensor,
    layout: StateLayout,
    layer: int,
    x_BC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    a_BV: torch.Tensor,
    b_BV: torch.Tensor,
    a_log_V: torch.Tensor,
    dt_bias_V: torch.Tensor,
    state_table_BL: torch.Tensor,
    position_B: torch.Tensor,
) -> torch.Tensor:
    """See :meth:`hybridcache.kernels.backend.Backend.gdn_decode`. Padding rows of the output are 0. Inputs may be slices
    whose last dimension has stride 1."""
    if x_BC.stride(-1) != 1 or a_BV.stride(-1) != 1 or b_BV.stride(-1) != 1:
        raise ValueError(
            f"x, a, b strides {x_BC.stride()}, {a_BV.stride()}, {b_BV.stride()}: the last dimension must be contiguous"
        )
    rows, (v_heads, _, value_dim) = x_BC.shape[0], layout.recurrent_shape
    out_BVJ = torch.empty((rows, v_heads, value_dim), dtype=x_BC.dtype, device=x_BC.device)
    if rows == 0:
        return out_BVJ
    state_dtype, conv_dtype = torch_dtype(layout.recurrent_dtype), torch_dtype(layout.conv_dtype)
    constant = constants(layout, x_BC.dtype)
    grid = (triton.cdiv(value_dim, constant["BLOCK_V"]), v_heads, rows)
    gdn_decode_kernel[grid](
        elements(buffer, state_dtype),
        elements(buffer, conv_dtype),
        x_BC,
        conv_weight_CW,
        a_BV,
        b_BV,
        a_log_V,
        dt_bias_V,
        state_table_BL,
        position_B,
        out_BVJ,
        layer,
        x_BC.stride(0),
        conv_weight_CW.stride(0),
        conv_weight_CW.stride(1),
        a_BV.stride(0),
        b_BV.stride(0),
        state_table_BL.stride(0),
        layout.base[layer] // state_dtype.itemsize,
        layout.stride // state_dtype.itemsize,
        (layout.base[layer] + layout.conv_offset) // conv_dtype.itemsize,
        layout.stride // conv_dtype.itemsize,
        **constant,
        **options(),
    )
    return out_BVJ
