"""Paged attention whose tile of keys is the page: the usual way to write it, kept as the baseline of a comparison.

A program reads one table entry, then that page's K and V as one tile each. Addresses are as simple as can be, but shared
memory grows with the page, and a page that is no power of two wastes the rest of its tile. The library's own kernels
(``paged_decode``, ``paged_prefill``) choose their tile freely and look rows up one by one; experiment
``kernel_block_size`` measures what that costs and what it buys. The references are those of ``paged_decode`` and
``paged_prefill``.

The table has one entry per page (``Tm = kb``): with larger manager blocks it must be expanded first. One kernel does both
operations: a decode step is a prefill of one query per row, whose pages several programs may share.
"""

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
WARPS = {"paged_decode": 4, "paged_prefill": 8}
STAGES = {"paged_decode": 3, "paged_prefill": 2}


# fmt: off
@triton.jit
def attend_pages(
    acc, highest, total, q, scale_log2, k_tile, v_tile, table_row, first_page, last_page, limit, end, manager_stride,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):
    # fmt: on
    """Online softmax over pages. With ``MASKED``, query ``m`` sees keys below ``limit[m]`` and none from ``end`` on."""
    token = tl.arange(0, BLOCK_N)
    wide = tl.arange(0, BLOCK_D) < DIM
    for page in tl.range(first_page, last_page, num_stages=STAGES):
        offset = tl.load(table_row + page).to(tl.int64) * manager_stride
        key = page * PAGE + token
        inside = token < PAGE
        if MASKED:
            inside = inside & (key < end)
        k = tl.load(k_tile + offset, mask=wide[:, None] & inside[None, :], other=0.0).to(DOT)
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
        v = tl.load(v_tile + offset, mask=inside[:, None] & wide[None, :], other=0.0).to(DOT)
        acc = tl.dot(p.to(DOT), v, acc * rescale[:, None], input_precision="ieee")
    return acc, highest, total


# fmt: off
@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["table_ptr", "cu_ptr", "length_ptr"])
def page_tiled_kernel(
    pool_ptr, q_ptr, table_ptr, cu_ptr, length_ptr, out_ptr, lse_ptr, scale_log2, splits,
    q_stride_t: tl.int64, q_stride_h: tl.int64, table_stride: tl.int64, base: tl.int64, manager_stride: tl.int64,
    kv_stride: tl.int64, k_token_stride: tl.int32, v_token_stride: tl.int32, k_head_stride: tl.int64, v_head_stride: tl.int64,
    PAGE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # fmt: on
    """Grid: (tiles of the longest row, KV heads, rows x splits of a row's pages), a row's last tile first. A tile is
    BLOCK_M / GROUP tokens times the heads of a group. With ``DECODE`` every row has one query, and ``cu_ptr`` is not read."""
    TOKENS: tl.constexpr = 1 if DECODE else BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    row = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    table_row = table_ptr + row * table_stride
    if DECODE:
        begin, queries = row, 1
    else:
        begin = tl.load(cu_ptr + row).to(tl.int64)
        queries = (tl.load(cu_ptr + row + 1) - begin).to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    if first >= queries:
        return
    length = tl.load(length_ptr + row)
    length = tl.where(tl.load(table_row) < 0, 0, length)

    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    query_inside = (token < queries) & (m < TOKENS * GROUP)
    q_mask = query_inside[:, None] & (dim < DIM)[None, :]
    q_row = (begin + token) * q_stride_t + head * q_stride_h
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=q_mask, other=0.0).to(DOT)

    limit = length - queries + token + 1
    seen = tl.maximum(length - queries + first + 1, 0)
    end = tl.maximum(tl.minimum(length - queries + first + TOKENS, length), 0)
    pages = tl.cdiv(end, PAGE)
    share = tl.cdiv(pages, splits)
    start = tl.minimum(split * share, pages)
    last = tl.minimum(start + share, pages)
    whole = tl.maximum(tl.minimum(last, seen // PAGE), start)
    n = tl.arange(0, BLOCK_N)
    k_tile = pool_ptr + (base + kv_head * k_head_stride) + dim[:, None] + n[None, :] * k_token_stride
    v_tile = pool_ptr + (base + kv_stride + kv_head * v_head_stride) + n[:, None] * v_token_stride + dim[None, :]
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # fmt: off
    acc, highest, total = attend_pages(
        acc, highest, total, q, scale_log2, k_tile, v_tile, table_row, start, whole, limit, end, manager_stride,
        PAGE, DIM, BLOCK_N, BLOCK_D, DOT, STAGES, False,
    )
    acc, highest, total = attend_pages(
        acc, highest, total, q, scale_log2, k_tile, v_tile, table_row, whole, last, limit, end, manager_stride,
        PAGE, DIM, BLOCK_N, BLOCK_D, DOT, 1, True,
    )
    # fmt: on
    # The highest score adds 1 to the total, so 1 changes nothing but the 0 of no tokens at all.
    total = tl.maximum(total, 1.0)
    out_row = (begin + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    if SPLIT:
        out_row = out_row * splits + split
        tl.store(lse_ptr + out_row, highest + tl.log2(total), mask=query_inside)
        q_mask = q_mask & (start < last)
    tl.store(out_ptr + out_row[:, None] * DIM + dim[None, :], acc / total[:, None], mask=q_mask)


def constants(operation: str, layout: AttentionLayout, num_heads: int, dtype: torch.dtype, split: bool) -> dict[str, Any]:
    """Compile-time parameters: the tile is the page, rounded up to a power of two."""
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    group, decode = num_heads // layout.num_kv_heads, operation == "paged_decode"
    return {
        "PAGE": layout.kernel_block_tokens, "KV_HEADS": layout.num_kv_heads, "GROUP": group, "DIM": layout.k_dim,
        "BLOCK_M": max(power_of_2(group), 16) if decode else QUERY_TILE,
        "BLOCK_N": max(power_of_2(layout.kernel_block_tokens), 16), "BLOCK_D": max(power_of_2(layout.k_dim), 16),
        "DECODE": decode, "SPLIT": split,
        # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
        "DOT": tl.float32 if interpreting() else dot, "STAGES": STAGES[operation],
    }  # fmt: skip


def _launch(
    operation: str, cache: AttentionCache, q: torch.Tensor, table: torch.Tensor, cu: torch.Tensor, lengths: torch.Tensor,
    scale: float, longest: int, splits: int = 1,
) -> torch.Tensor:  # fmt: skip
    layout, (queries, num_heads, dim) = cache.layout, q.shape
    if layout.tokens_per_entry != layout.kernel_block_tokens:
        text = f"page-tiled attention needs one table entry per page; an entry holds {layout.tokens_per_entry} tokens"
        raise bad("kernel_block_tokens", layout.kernel_block_tokens, text)
    if layout.k_dim != layout.v_dim:
        raise bad("v_dim", layout.v_dim, f"page-tiled attention needs K and V of one width, here {layout.k_dim}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part, lse = out, out
    if splits > 1:
        part = torch.empty((queries, num_heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((queries, num_heads, splits), dtype=torch.float32, device=q.device)
    constant = constants(operation, layout, num_heads, q.dtype, splits > 1)
    tokens = 1 if constant["DECODE"] else QUERY_TILE // constant["GROUP"]
    launcher(page_tiled_kernel)[(ceil_div(longest, tokens), layout.num_kv_heads, lengths.shape[0] * splits)](
        cache.pool, q, table, cu, lengths, part, lse, scale * LOG2_E, splits, q.stride(0), q.stride(1), table.stride(0),
        **{name: stride for name, stride in cache.strides.items() if name != "kernel_stride"},
        **constant,
        num_warps=WARPS[operation],
    )  # fmt: skip
    if splits > 1:
        combine(part, lse, out)
    return out


def paged_decode(
    cache: AttentionCache, q_BHD: torch.Tensor, kv_table_BN: torch.Tensor, context_len_B: torch.Tensor, scale: float,
    *, num_splits: int = 1,
) -> torch.Tensor:  # fmt: skip
    """See :meth:`hybridcache.kernels.operations.AttentionOperations.paged_decode`; ``num_splits`` programs share a row's pages.

    Raises:
        UserError: an entry is several kernel blocks, or K and V differ in width.
    """
    rows = (kv_table_BN, context_len_B, context_len_B)
    return _launch("paged_decode", cache, q_BHD, *rows, scale, 1, num_splits)


def paged_prefill(
    cache: AttentionCache, q_THD: torch.Tensor, kv_table_BN: torch.Tensor, cu_seqlens: torch.Tensor,
    context_len_B: torch.Tensor, scale: float, max_query_len: int, max_context_len: int,
) -> torch.Tensor:  # fmt: skip
    """See :meth:`hybridcache.kernels.operations.AttentionOperations.paged_prefill`. ``max_context_len`` is not needed. What
    stands in the output behind the last row is undefined.

    Raises:
        UserError: an entry is several kernel blocks, or K and V differ in width.
    """
    rows = (kv_table_BN, cu_seqlens, context_len_B)
    return _launch("paged_prefill", cache, q_THD, *rows, scale, max_query_len)
