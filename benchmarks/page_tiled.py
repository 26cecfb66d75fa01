"""Paged attention whose tile of keys is the page: the usual way to write it, kept as the baseline of a comparison.

A program reads one table entry, then that page's K and V as one tile each. Addresses are as simple as can be, but shared
memory grows with the page, and a page that is no power of two wastes the rest of its tile. The library's own kernels
(``paged_decode``, ``paged_prefill``) choose their tile freely and look rows up one by one; experiment
``kernel_block_size`` measures what that costs and what it buys. The references are those of ``paged_decode`` and
``paged_prefill``.

The table has one entry per page (``Tm = kb``): with larger manager blocks it must be expanded first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcache.errors import bad
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.paged_decode.triton import combine
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import AttentionLayout

LOG2_E = 1.4426950408889634
QUERY_TILE = 128
"""Rows of a prefill program: tokens x query heads of one KV head."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int


DECODE = Launch(num_warps=4, num_stages=3)
PREFILL = Launch(num_warps=8, num_stages=2)


@triton.jit
def attend_pages(
    acc,
    highest,
    total,
    q,
    scale_log2,
    k_ptr,
    v_ptr,
    table_row,
    first_page,
    last_page,
    limit,
    end,
    manager_stride,
    k_token_stride,
    v_token_stride,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over pages. With ``MASKED``, query ``m`` sees keys below ``limit[m]`` and none from ``end`` on."""
    token = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    k_tile = k_ptr + dim[:, None] + token[None, :] * k_token_stride
    v_tile = v_ptr + token[:, None] * v_token_stride + dim[None, :]
    for page in tl.range(first_page, last_page, num_stages=STAGES):
        entry = tl.load(table_row + page).to(tl.int64)
        key = page * PAGE + token
        inside = token < PAGE
        if MASKED:
            inside = inside & (key < end)
        k = tl.load(k_tile + entry * manager_stride, mask=(dim < DIM)[:, None] & inside[None, :], other=0.0).to(DOT)
        score = tl.dot(q, k, input_precision="ieee") * scale_log2
        if MASKED:
            score = tl.where(inside[None, :] & (key[None, :] < limit[:, None]), score, float("-inf"))
        elif PAGE != BLOCK_N:
            score = tl.where(inside[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(p, 1)
        highest = new_highest
        v = tl.load(v_tile + entry * manager_stride, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0).to(DOT)
        acc = tl.dot(p.to(DOT), v, acc * rescale[:, None], input_precision="ieee")
    return acc, highest, total


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["table_ptr", "length_ptr"])
def page_decode_kernel(
    pool_ptr,
    q_ptr,
    table_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    splits,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    table_stride: tl.int64,
    base: tl.int64,
    manager_stride: tl.int64,
    kv_stride: tl.int64,
    k_token_stride: tl.int32,
    v_token_stride: tl.int32,
    k_head_stride: tl.int64,
    v_head_stride: tl.int64,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (rows, KV heads, splits of a row's pages). Outputs are those of ``paged_decode_kernel``."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    table_row = table_ptr + row * table_stride
    length = tl.load(length_ptr + row)
    length = tl.where(tl.load(table_row) < 0, 0, length)
    num_pages = tl.cdiv(length, PAGE)
    split_pages = tl.cdiv(num_pages, splits)
    first = tl.minimum(split * split_pages, num_pages)
    last = tl.minimum(first + split_pages, num_pages)
    whole = tl.maximum(tl.minimum(last, length // PAGE), first)

    in_group = tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    dim = tl.arange(0, BLOCK_D)
    head_inside = in_group < GROUP
    q_mask = head_inside[:, None] & (dim < DIM)[None, :]
    q_at = q_ptr + row * q_stride_b + head[:, None] * q_stride_h + dim[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0).to(DOT)
    k_ptr = pool_ptr + (base + kv_head * k_head_stride)
    v_ptr = pool_ptr + (base + kv_stride + kv_head * v_head_stride)
    highest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    limit = tl.zeros([BLOCK_H], dtype=tl.int32) + length
    # fmt: off
    acc, highest, total = attend_pages(
        acc, highest, total, q, scale_log2, k_ptr, v_ptr, table_row, first, whole, limit, length,
        manager_stride, k_token_stride, v_token_stride, PAGE, DIM, BLOCK_N, BLOCK_D, DOT, STAGES, False,
    )
    acc, highest, total = attend_pages(
        acc, highest, total, q, scale_log2, k_ptr, v_ptr, table_row, whole, last, limit, length,
        manager_stride, k_token_stride, v_token_stride, PAGE, DIM, BLOCK_N, BLOCK_D, DOT, 1, True,
    )
    # fmt: on
    # The highest score adds 1 to the total, so 1 changes nothing but the 0 of no tokens at all.
    total = tl.maximum(total, 1.0)
    out_row = row * (KV_HEADS * GROUP) + head
    out_mask = q_mask
    if SPLIT:
        out_row = out_row * splits + split
        tl.store(lse_ptr + out_row, highest + tl.log2(total), mask=head_inside)
        out_mask = out_mask & (first < last)
    tl.store(out_ptr + out_row[:, None] * DIM + dim[None, :], acc / total[:, None], mask=out_mask)


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "cu_ptr", "length_ptr"])
def page_prefill_kernel(
    pool_ptr,
    q_ptr,
    table_ptr,
    cu_ptr,
    length_ptr,
    out_ptr,
    scale_log2,
    q_stride_t: tl.int64,
    q_stride_h: tl.int64,
    table_stride: tl.int64,
    base: tl.int64,
    manager_stride: tl.int64,
    kv_stride: tl.int64,
    k_token_stride: tl.int32,
    v_token_stride: tl.int32,
    k_head_stride: tl.int64,
    v_head_stride: tl.int64,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (tiles of the longest row, KV heads, rows), a row's last tile first. A tile is BLOCK_M / GROUP tokens times the
    heads of a group."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    table_row = table_ptr + row * table_stride
    begin = tl.load(cu_ptr + row)
    queries = tl.load(cu_ptr + row + 1) - begin
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if first >= queries:
        return
    length = tl.load(length_ptr + row)
    length = tl.where(tl.load(table_row) < 0, 0, length)

    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    q_mask = ((token < queries) & (m < TOKENS * GROUP))[:, None] & (dim < DIM)[None, :]
    q_row = (begin + token).to(tl.int64) * q_stride_t + head * q_stride_h
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=q_mask, other=0.0).to(DOT)

    limit = length - queries + token + 1
    seen = tl.maximum(length - queries + first + 1, 0)
    end = tl.minimum(length - queries + first + TOKENS, length)
    whole = seen // PAGE
    last = tl.cdiv(tl.maximum(end, 0), PAGE)
    k_ptr = pool_ptr + (base + kv_head * k_head_stride)
    v_ptr = pool_ptr + (base + kv_stride + kv_head * v_head_stride)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # fmt: off
    acc, highest, total = attend_pages(
        acc, highest, total, q, scale_log2, k_ptr, v_ptr, table_row, 0, whole, limit, end,
        manager_stride, k_token_stride, v_token_stride, PAGE, DIM, BLOCK_N, BLOCK_D, DOT, STAGES, False,
    )
    acc, highest, total = attend_pages(
        acc, highest, total, q, scale_log2, k_ptr, v_ptr, table_row, whole, last, limit, end,
        manager_stride, k_token_stride, v_token_stride, PAGE, DIM, BLOCK_N, BLOCK_D, DOT, 1, True,
    )
    # fmt: on
    out_row = ((begin + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * DIM
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + out_row[:, None] + dim[None, :], out, mask=q_mask)


def constants(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, launch: Launch) -> dict[str, Any]:
    """Compile-time parameters that both kernels share: the tile is the page, rounded up to a power of two."""
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "PAGE": layout.kernel_block_tokens,
        "KV_HEADS": layout.num_kv_heads,
        "GROUP": num_heads // layout.num_kv_heads,
        "DIM": layout.k_dim,
        "BLOCK_N": max(power_of_2(layout.kernel_block_tokens), 16),
        "BLOCK_D": max(power_of_2(layout.k_dim), 16),
        # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
        "DOT": tl.float32 if interpreting() else dot,
        "STAGES": launch.num_stages,
    }


def decode_constants(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, *, split: bool) -> dict[str, Any]:
    """Compile-time parameters of :func:`page_decode_kernel`."""
    shared = constants(layout, num_heads, dtype, DECODE)
    return {**shared, "BLOCK_H": max(power_of_2(shared["GROUP"]), 16), "SPLIT": split}


def prefill_constants(layout: AttentionLayout, num_heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time parameters of :func:`page_prefill_kernel`."""
    return {**constants(layout, num_heads, dtype, PREFILL), "BLOCK_M": QUERY_TILE}


def _strides(cache: AttentionCache) -> dict[str, int]:
    """Raises UserError for layouts whose table entries are not pages."""
    layout = cache.layout
    if layout.tokens_per_entry != layout.kernel_block_tokens:
        raise bad(
            "kernel_block_tokens",
            layout.kernel_block_tokens,
            f"page-tiled attention needs one table entry per page; an entry holds {layout.tokens_per_entry} tokens",
        )
    if layout.k_dim != layout.v_dim:
        raise bad("v_dim", layout.v_dim, f"page-tiled attention needs K and V of one width, here {layout.k_dim}")
    return {name: stride for name, stride in cache.strides.items() if name != "kernel_stride"}


def paged_decode(
    cache: AttentionCache,
    q_BHD: torch.Tensor,
    kv_table_BN: torch.Tensor,
    context_len_B: torch.Tensor,
    scale: float,
    *,
    num_splits: int = 1,
) -> torch.Tensor:
    """See :meth:`hybridcache.kernels.operations.AttentionOperations.paged_decode`; ``num_splits`` programs share a row's pages.

    Raises:
        UserError: an entry is several kernel blocks, or K and V differ in width.
    """
    rows, num_heads, dim = q_BHD.shape
    strides, layout = _strides(cache), cache.layout
    out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    part, lse = out_BHD, out_BHD
    if num_splits > 1:
        part = torch.empty((rows, num_heads, num_splits, dim), dtype=torch.float32, device=q_BHD.device)
        lse = torch.empty((rows, num_heads, num_splits), dtype=torch.float32, device=q_BHD.device)
    launcher(page_decode_kernel)[(rows, layout.num_kv_heads, num_splits)](
        cache.pool,
        q_BHD,
        kv_table_BN,
        context_len_B,
        part,
        lse,
        scale * LOG2_E,
        num_splits,
        q_BHD.stride(0),
        q_BHD.stride(1),
        kv_table_BN.stride(0),
        **strides,
        **decode_constants(layout, num_heads, q_BHD.dtype, split=num_splits > 1),
        num_warps=DECODE.num_warps,
    )
    if num_splits > 1:
        combine(part, lse, out_BHD)
    return out_BHD


def paged_prefill(
    cache: AttentionCache,
    q_THD: torch.Tensor,
    kv_table_BN: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_len_B: torch.Tensor,
    scale: float,
    max_query_len: int,
    max_context_len: int,
) -> torch.Tensor:
    """See :meth:`hybridcache.kernels.operations.AttentionOperations.paged_prefill`. ``max_context_len`` is not
    needed. What stands in the output behind the last row is undefined.

    Raises:
        UserError: an entry is several kernel blocks, or K and V differ in width.
    """
    strides, layout, num_heads = _strides(cache), cache.layout, q_THD.shape[1]
    group = num_heads // layout.num_kv_heads
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    grid = (ceil_div(max_query_len, QUERY_TILE // group), layout.num_kv_heads, context_len_B.shape[0])
    launcher(page_prefill_kernel)[grid](
        cache.pool,
        q_THD,
        kv_table_BN,
        cu_seqlens,
        context_len_B,
        out_THD,
        scale * LOG2_E,
        q_THD.stride(0),
        q_THD.stride(1),
        kv_table_BN.stride(0),
        **strides,
        **prefill_constants(layout, num_heads, q_THD.dtype),
        num_warps=PREFILL.num_warps,
    )
    return out_THD
