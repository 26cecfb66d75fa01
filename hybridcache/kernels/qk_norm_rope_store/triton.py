"""q/k norm, partial rotary positions and the KV store in Triton, one launch.

A program takes one token and up to ``BLOCK_H`` of its query heads, or of its K and V heads. A thread reads its elements and,
for rotated dims, once more the elements that they are paired with, rather than exchange them with other threads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.pool_rows import row_offset
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import AttentionLayout

OPTIONS = {"num_warps": 4}
"""Of a launch."""
TILE_ELEMENTS = 1_024
"""Elements of q that one program takes at most."""


@triton.jit
def norm_rotate(
    x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, x_head, out_head, head_inside,
    DIM: tl.constexpr, PAIRS: tl.constexpr, PAIR_RUN: tl.constexpr, BLOCK_D: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``x / rms(x) * (1 + weight)`` of some heads of one token, rotated; ``x_head`` and ``out_head`` are their offsets.

    Every load has the shape of the tile, the weights' and angles' too (which then come from the L1 cache): so all have one
    layout, and no exchange between threads stands between two of them.
    """
    dim = tl.arange(0, BLOCK_D)
    first_half = dim < PAIRS
    partner = tl.where(first_half, dim + PAIRS, dim - PAIRS)
    partner = tl.max_contiguous(tl.multiple_of(partner, PAIR_RUN), PAIR_RUN)
    pair = tl.where(first_half, dim, dim - PAIRS)
    pair = tl.max_contiguous(tl.multiple_of(pair, PAIR_RUN), PAIR_RUN)
    inside = head_inside[:, None] & (dim < DIM)[None, :]
    rotated = head_inside[:, None] & (dim < 2 * PAIRS)[None, :]
    same = (x_head * 0).to(tl.int32)[:, None]

    x = tl.load(x_ptr + x_head[:, None] + dim[None, :], mask=inside, other=0.0).to(ACC)
    x_partner = tl.load(x_ptr + x_head[:, None] + partner[None, :], mask=rotated, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + same + dim[None, :], mask=inside, other=0.0).to(ACC)
    weight_partner = tl.load(weight_ptr + same + partner[None, :], mask=rotated, other=0.0).to(ACC)
    cos = tl.load(cos_ptr + same + pair[None, :], mask=rotated, other=1.0).to(ACC)
    sin = tl.load(sin_ptr + same + pair[None, :], mask=rotated, other=0.0).to(ACC)
    sin = tl.where(first_half[None, :], -sin, sin)

    scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPS)[:, None]
    out = (x * (1.0 + weight) * cos + x_partner * (1.0 + weight_partner) * sin) * scale
    # Rounded as a tensor of x's type would be, whatever the type of the cache.
    tl.store(out_ptr + out_head[:, None] + dim[None, :], out.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "row_ptr", "position_ptr"])
def qk_norm_rope_store_kernel(
    pool_ptr, q_ptr, k_ptr, v_ptr, out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, table_ptr, row_ptr,
    position_ptr,
    table_stride: tl.int64, q_stride_t: tl.int64, q_stride_h: tl.int64, k_stride_t: tl.int64, k_stride_h: tl.int64,
    v_stride_t: tl.int64, v_stride_h: tl.int64, angle_stride: tl.int64, base: tl.int64, manager_stride: tl.int64,
    kernel_stride: tl.int64, kv_stride: tl.int64, k_token_stride: tl.int64, v_token_stride: tl.int64,
    k_head_stride: tl.int64, v_head_stride: tl.int64,
    TM: tl.constexpr, KB: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, PAIRS: tl.constexpr, PAIR_RUN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    KV_PARTS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos_ptr += token * angle_stride
    sin_ptr += token * angle_stride
    if part >= KV_PARTS:
        head = (part - KV_PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
        out_ptr += token * (Q_HEADS * DIM)
        norm_rotate(
            q_ptr + token * q_stride_t, out_ptr, q_weight_ptr, cos_ptr, sin_ptr, head * q_stride_h, head * DIM,
            head < Q_HEADS, DIM, PAIRS, PAIR_RUN, BLOCK_D, EPS, ACC,
        )  # fmt: skip
        return

    table_row = table_ptr + tl.load(row_ptr + token).to(tl.int64) * table_stride
    # A padding row's position may be stale and lie beyond the table: its first entry alone says that it is one.
    if tl.load(table_row) < 0:
        return
    position = tl.load(position_ptr + token).to(tl.int32)
    entry = tl.load(table_row + position // TM)
    if entry < 0:
        return
    head = part * BLOCK_H + tl.arange(0, BLOCK_H)
    if V_DIM > 0:
        dim = tl.arange(0, BLOCK_V)[None, :]
        inside = (head < KV_HEADS)[:, None] & (dim < V_DIM)
        v = tl.load(v_ptr + token * v_stride_t + (head * v_stride_h)[:, None] + dim, mask=inside, other=0.0)
        v_row = row_offset(entry, position, base, manager_stride, kernel_stride, v_token_stride, TM, KB)
        tl.store(pool_ptr + v_row + kv_stride + (head * v_head_stride)[:, None] + dim, v, mask=inside)
    k_row = row_offset(entry, position, base, manager_stride, kernel_stride, k_token_stride, TM, KB)
    norm_rotate(
        k_ptr + token * k_stride_t, pool_ptr + k_row, k_weight_ptr, cos_ptr, sin_ptr, head * k_stride_h,
        head * k_head_stride, head < KV_HEADS, DIM, PAIRS, PAIR_RUN, BLOCK_D, EPS, ACC,
    )  # fmt: skip


def constants(layout: AttentionLayout, q_heads: int, pairs: int, eps: float, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time parameters of :func:`qk_norm_rope_store_kernel` for a layout and an activation dtype."""
    dim, v_dim = layout.k_dim, layout.v_dim
    fits = max(TILE_ELEMENTS // power_of_2(max(dim, v_dim)), 1)
    return {
        "TM": layout.tokens_per_entry, "KB": layout.kernel_block_tokens, "Q_HEADS": q_heads,
        "KV_HEADS": layout.num_kv_heads, "DIM": dim, "V_DIM": v_dim, "PAIRS": pairs,
        "PAIR_RUN": min(pairs & -pairs, 16), "BLOCK_H": min(power_of_2(q_heads), fits), "BLOCK_D": power_of_2(dim),
        "BLOCK_V": power_of_2(max(v_dim, 1)), "EPS": eps, "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def qk_norm_rope_store(
    cache: AttentionCache, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor,
    eps: float, cos_TP: Tensor, sin_TP: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor,
) -> Tensor:  # fmt: skip
    """Normalise and rotate q and k of every token, write K and V to their addresses, return q.

    The norm is ``x / sqrt(mean(x^2) + eps) * (1 + weight)`` over the head dim; the rotation turns dims ``(i, i + P)`` by
    the token's angle ``i`` and leaves those from ``2 P`` on (Transformers 5, ``Qwen3NextAttention``). Arithmetic is at least
    float32 and each result is rounded once to the inputs' dtype (K then to the cache's). A padding row, or a position
    whose entry is -1, writes nothing; its q is returned like any other. q, k and v may be slices whose last dimension has
    stride 1.

    Returns:
        ``[T, H, D]`` in q's dtype, contiguous.

    Raises:
        UserError: q and k heads differ in width, or more dims are rotated than a head has.
        ValueError: a last dimension is not contiguous.
    """
    layout = cache.layout
    tokens, q_heads, dim = q_THD.shape
    pairs = cos_TP.shape[-1]
    if dim != layout.k_dim:
        raise bad("head_dim", dim, f"q must be as wide as the cache's k_dim={layout.k_dim}")
    if not 0 < 2 * pairs <= dim:
        raise bad("rotary_dim", 2 * pairs, f"choose an even number from 2 to head_dim={dim}")
    for name, x in (("q", q_THD), ("k", k_TKD), ("v", v_TKD), ("cos", cos_TP), ("sin", sin_TP)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} strides {x.stride()}: the last dimension must be contiguous")
    if cos_TP.shape != (tokens, pairs) or cos_TP.stride(0) != sin_TP.stride(0):
        raise ValueError(f"cos, sin {tuple(cos_TP.shape)}, strides {cos_TP.stride()}, {sin_TP.stride()}: equal [T, P]")
    out_THD = torch.empty((tokens, q_heads, dim), dtype=q_THD.dtype, device=q_THD.device)
    if tokens == 0:
        return out_THD
    constant = constants(layout, q_heads, pairs, eps, q_THD.dtype)
    parts = ceil_div(layout.num_kv_heads, constant["BLOCK_H"]) + ceil_div(q_heads, constant["BLOCK_H"])
    launcher(qk_norm_rope_store_kernel)[(tokens, parts)](
        cache.pool, q_THD, k_TKD, v_TKD, out_THD, q_weight_D, k_weight_D, cos_TP, sin_TP, kv_table_BN, row_T,
        position_T,
        kv_table_BN.stride(0), q_THD.stride(0), q_THD.stride(1), k_TKD.stride(0), k_TKD.stride(1), v_TKD.stride(0),
        v_TKD.stride(1), cos_TP.stride(0),
        **cache.strides, **constant, **OPTIONS,
    )  # fmt: skip
    return out_THD
