"""Paged prefill in Triton: causal attention of the new tokens of many requests over their paged KV.

A program takes one tile of queries: consecutive tokens of one request times all query heads of one KV head, so that a
short chunk still fills the matrix unit and K and V are read once for the whole group. It reads K and V in place, row by
row through the manager table; its tile of keys has nothing to do with the size of a page. Keys that every query of the tile
sees need no mask; only the last tiles, on the diagonal, have one.

The grid follows from the number of tokens and rows alone, and each program searches its request in ``cu_seqlens``: the host
reads no length from the device. A request's longest tiles come first, so that the short ones fill the gaps at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.paged_prefill.tiles import Tiles, check_inputs, choose_tiles, max_tiles
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import AttentionLayout

LOG2_E = 1.4426950408889634
SEARCH_ROWS = 128
"""Requests that one step of the search in ``cu_seqlens`` looks at."""


@triton.jit
def find_tile(cu_ptr, rows, tokens, tile, TOKENS: tl.constexpr, SEARCH: tl.constexpr):
    """``(row, first, tiles)``: the request that the tile belongs to, the number of its first tile, and the tiles of all.

    Requests lie one after another. Tokens behind the last one count as a request of their own, ``row == rows``.
    """
    row = 0
    first = 0
    tiles = 0
    for start in range(0, rows + 1, SEARCH):
        b = start + tl.arange(0, SEARCH)
        begin = tl.load(cu_ptr + b, mask=b <= rows, other=0)
        end = tl.load(cu_ptr + b + 1, mask=b < rows, other=0)
        end = tl.where(b == rows, tokens, end)
        own = (end - begin + TOKENS - 1) // TOKENS
        before = tiles + tl.cumsum(own, 0) <= tile
        row += tl.sum(before.to(tl.int32), 0)
        first += tl.sum(tl.where(before, own, 0), 0)
        tiles += tl.sum(own, 0)
    return row, first, tiles


@triton.jit
def table_entries(table_row, start, last, TM: tl.constexpr, BLOCK_N: tl.constexpr):
    """Table entries of the tile at ``start``; beyond the position ``last``, its entry."""
    return tl.load(table_row + tl.minimum(start + tl.arange(0, BLOCK_N), last) // TM)


@triton.jit
def load_rows(ptr, rows, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """``[BLOCK_N, BLOCK_D]``, zeros beyond ``DIM`` and, with ``MASKED``, where ``inside`` is false."""
    dim = tl.arange(0, BLOCK_D)
    at = (ptr + dim)[None, :] + rows[:, None]
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
    if DIM != BLOCK_D:
        return tl.load(at, mask=tl.broadcast_to((dim < DIM)[None, :], at.shape), other=0.0)
    return tl.load(at)


@triton.jit
def attend(
    acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, start, stop, end, limit,
    manager_stride, kernel_stride, k_token_stride, v_token_stride,
    TM: tl.constexpr, KB: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SAME_ROWS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``start .. stop - 1`` (tiles from ``start`` on). With ``MASKED``, query ``m`` sees keys
    below ``limit[m]`` and nothing at ``end`` or beyond is read.

    ``entry`` holds the table entries of the tile at ``start``, on return those of the tile behind the last. They are read
    one tile ahead: a load inside the loop that another load's address needs would take a stage of the software pipeline
    from K and V.
    """
    last = tl.maximum(end - 1, 0)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        key = first + tl.arange(0, BLOCK_N)
        inside = key < end
        # An entry's own extent is below 2^31 elements; only the entry's offset needs 64 bits.
        block = entry.to(tl.int64) * manager_stride + key % TM // KB * kernel_stride
        k_row = block + key % KB * k_token_stride
        v_row = k_row if SAME_ROWS else block + key % KB * v_token_stride
        entry = table_entries(table_row, first + BLOCK_N, last, TM, BLOCK_N)
        k = load_rows(k_ptr, k_row, inside, K_DIM, BLOCK_K, MASKED).to(DOT)
        v = load_rows(v_ptr, v_row, inside, V_DIM, BLOCK_V, MASKED).to(DOT)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
        # Every query sees key 0, so no maximum stays at -inf.
        new_highest = tl.maximum(highest, tl.max(score, 1))
        p = tl.exp2(score * scale_log2 - (new_highest * scale_log2)[:, None])
        rescale = tl.exp2((highest - new_highest) * scale_log2)
        total = total * rescale + tl.sum(p, 1)
        highest = new_highest
        acc = tl.dot(p.to(DOT), v, acc * rescale[:, None], input_precision="ieee")
    return acc, highest, total, entry


@triton.jit(do_not_specialize=["rows", "tokens"], do_not_specialize_on_alignment=["table_ptr", "cu_ptr", "length_ptr"])
def paged_prefill_kernel(
    pool_ptr, q_ptr, table_ptr, cu_ptr, length_ptr, out_ptr, scale_log2, rows, tokens,
    q_stride_t: tl.int64, q_stride_h: tl.int64, table_stride: tl.int64, base: tl.int64, manager_stride: tl.int32,
    kernel_stride: tl.int32, kv_stride: tl.int64, k_token_stride: tl.int32, v_token_stride: tl.int32,
    k_head_stride: tl.int64, v_head_stride: tl.int64,
    TM: tl.constexpr, KB: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, SAME_ROWS: tl.constexpr, SEARCH: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles x KV heads x tiles of a group's heads). Output is ``[T, H, V_DIM]``, contiguous."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    head_tile = tl.program_id(0) % (KV_HEADS * HEAD_TILES)
    tile = tl.program_id(0) // (KV_HEADS * HEAD_TILES)
    kv_head = head_tile // HEAD_TILES

    row, first_tile, tiles = find_tile(cu_ptr, rows, tokens, tile, TOKENS, SEARCH)
    if tile >= tiles:
        return
    live = row < rows
    begin = tl.load(cu_ptr + row)
    queries = tl.load(cu_ptr + row + 1, mask=live, other=0)
    queries = tl.where(live, queries, tokens) - begin
    first = ((queries + TOKENS - 1) // TOKENS - 1 - (tile - first_tile)) * TOKENS
    table_row = table_ptr + tl.minimum(row, rows - 1).to(tl.int64) * table_stride
    live = live & (tl.load(table_row) >= 0)
    length = tl.load(length_ptr + row, mask=live, other=0)

    # The tile's rows: query m is head m % HEADS of token m // HEADS, both counted from the tile's first.
    m = tl.arange(0, BLOCK_M)
    first_head = head_tile % HEAD_TILES * HEADS
    m_inside = (m < tl.minimum(queries - first, TOKENS) * HEADS) & (m % HEADS < GROUP - first_head)
    first_token = (begin + first).to(tl.int64)
    first_head += kv_head * GROUP
    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    q_tile = q_ptr + first_token * q_stride_t + first_head * q_stride_h
    q_offset = m // HEADS * q_stride_t + m % HEADS * q_stride_h
    q_mask = m_inside[:, None] & (k_dim < K_DIM)[None, :]
    q = tl.load(q_tile + q_offset[:, None] + k_dim[None, :], mask=q_mask, other=0.0).to(DOT)

    # Query m sees the keys below limit[m]; all queries of the tile see those below seen, none those from end on.
    limit = length - queries + first + m // HEADS + 1
    seen = tl.where(live, length - queries + first + 1, 0)
    end = tl.minimum(seen + TOKENS - 1, length)
    unmasked = seen // BLOCK_N * BLOCK_N
    k_ptr = pool_ptr + (base + kv_head * k_head_stride)
    v_ptr = pool_ptr + (base + kv_stride + kv_head * v_head_stride)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    entry = table_entries(table_row, 0, tl.maximum(end - 1, 0), TM, BLOCK_N)
    # fmt: off
    acc, highest, total, entry = attend(
        acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, 0, unmasked, end, limit,
        manager_stride, kernel_stride, k_token_stride, v_token_stride,
        TM, KB, K_DIM, V_DIM, BLOCK_N, BLOCK_K, BLOCK_V, SAME_ROWS, DOT, STAGES, False,
    )
    acc, highest, total, entry = attend(
        acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, unmasked, end, end, limit,
        manager_stride, kernel_stride, k_token_stride, v_token_stride,
        TM, KB, K_DIM, V_DIM, BLOCK_N, BLOCK_K, BLOCK_V, SAME_ROWS, DOT, 1, True,
    )
    # fmt: on

    # Only a row without keys has a total of 0.
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_tile = out_ptr + (first_token * (KV_HEADS * GROUP) + first_head) * V_DIM
    out_offset = (m // HEADS * (KV_HEADS * GROUP) + m % HEADS) * V_DIM
    out_mask = m_inside[:, None] & (v_dim < V_DIM)[None, :]
    tl.store(out_tile + out_offset[:, None] + v_dim[None, :], out, mask=out_mask)


def constants(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, tiles: Tiles) -> dict[str, Any]:
    """Compile-time parameters of :func:`paged_prefill_kernel` for a layout, query heads, their dtype and tiles."""
    group = num_heads // layout.num_kv_heads
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "TM": layout.tokens_per_entry, "KB": layout.kernel_block_tokens, "KV_HEADS": layout.num_kv_heads,
        "GROUP": group, "HEADS": min(group, tiles.queries), "K_DIM": layout.k_dim, "V_DIM": layout.v_dim,
        "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "BLOCK_K": max(power_of_2(layout.k_dim), 16),
        "BLOCK_V": max(power_of_2(layout.v_dim), 16),
        # Two sets of addresses for float32, whose products then keep within the registers.
        "SAME_ROWS": dtype.itemsize < 4 and layout.token_stride[0] == layout.token_stride[1], "SEARCH": SEARCH_ROWS,
        # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
        "DOT": tl.float32 if interpreting() else dot, "STAGES": tiles.num_stages,
    }  # fmt: skip


def paged_prefill(
    cache: AttentionCache, q_THD: Tensor, kv_table_BN: Tensor, cu_seqlens: Tensor, context_len_B: Tensor, scale: float,
    max_query_len: int, max_context_len: int, *, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`.AttentionOperations.paged_prefill`. Output of padding rows and of tokens behind the last
    row is 0. ``max_context_len`` is not needed.

    Args:
        tiles: :func:`choose_tiles` decides where None.

    Raises:
        UserError, ValueError: see :func:`~hybridcache.kernels.paged_prefill.tiles.check_inputs`.
    """
    layout = cache.layout
    check_inputs(layout, q_THD, scale)
    tokens, num_heads, _ = q_THD.shape
    out_THD = torch.empty((tokens, num_heads, layout.v_dim), dtype=q_THD.dtype, device=q_THD.device)
    rows = context_len_B.shape[0]
    if tokens == 0 or rows == 0 or kv_table_BN.shape[1] == 0:
        return out_THD.zero_()

    tiles = tiles or choose_tiles(layout, num_heads, q_THD.dtype, max_query_len)
    constant = constants(layout, num_heads, q_THD.dtype, tiles)
    head_tiles = layout.num_kv_heads * ceil_div(constant["GROUP"], constant["HEADS"])
    launcher(paged_prefill_kernel)[(max_tiles(tokens, rows, constant["BLOCK_M"] // constant["HEADS"]) * head_tiles,)](
        cache.pool, q_THD, kv_table_BN, cu_seqlens, context_len_B, out_THD, scale * LOG2_E, rows, tokens,
        q_THD.stride(0), q_THD.stride(1), kv_table_BN.stride(0),
        **cache.strides, **constant, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out_THD
