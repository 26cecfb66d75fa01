"""One split of one row, step by step: the tiles of keys that a program of paged decode attends to.

A tile's rows are tokens times the KV heads that a program takes together, heads innermost: with two heads, rows 0 and 1 are
token 0's, rows 2 and 3 token 1's, as they usually lie in memory. Queries see the rows of their own KV head; the products
with the others' rows are masked, and cost nothing where queries would otherwise be padded to the matrix unit's 16 rows.
"""

import triton
import triton.language as tl

from hybridcache.kernels.paged_prefill.triton import load_rows, table_entries


@triton.jit
def tile_entries(table_row, start, last, TM: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """Table entries of the rows of the tile at token ``start``; beyond the position ``last``, its entry."""
    if TOGETHER == 1:
        return table_entries(table_row, start, last, TM, BLOCK_N)
    return tl.load(table_row + tl.minimum(start + tl.arange(0, BLOCK_N) // TOGETHER, last) // TM)


@triton.jit
def attend_split(
    acc,
    highest,
    total,
    entry,
    q,
    q_head,
    scale_log2,
    k_ptr,
    v_ptr,
    table_row,
    start,
    stop,
    end,
    manager_stride,
    kernel_stride,
    k_token_stride,
    v_token_stride,
    k_head_stride,
    v_head_stride,
    TM: tl.constexpr,
    KB: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOGETHER: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over tokens ``start .. stop - 1`` (tiles of ``BLOCK_N // TOGETHER`` tokens from ``start`` on). With
    ``MASKED`` nothing at ``end`` or beyond is read. ``q_head[m]`` is the KV head of query m among those together.

    ``entry`` holds the table entries of the tile at ``start``, on return those of the tile behind the last. They are read
    one tile ahead: a load inside the loop that another load's address needs would take a stage of the software pipeline
    from K and V.
    """
    TOKENS: tl.constexpr = BLOCK_N // TOGETHER
    last = tl.maximum(end - 1, 0)
    for first in tl.range(start, stop, TOKENS, num_stages=STAGES):
        if TOGETHER == 1:
            key = first + tl.arange(0, BLOCK_N)
        else:
            key = first + tl.arange(0, BLOCK_N) // TOGETHER
        inside = key < end
        # An entry's own extent is below 2^31 elements; only the entry's offset needs 64 bits.
        block = entry.to(tl.int64) * manager_stride + key % TM // KB * kernel_stride
        k_row = block + key % KB * k_token_stride
        v_row = k_row if SAME_ROWS else block + key % KB * v_token_stride
        if TOGETHER > 1:
            k_head = tl.arange(0, BLOCK_N) % TOGETHER
            k_row += k_head * k_head_stride
            v_row = k_row if SAME_ROWS else v_row + k_head * v_head_stride
        entry = tile_entries(table_row, first + TOKENS, last, TM, BLOCK_N, TOGETHER)
        k = load_rows(k_ptr, k_row, inside, K_DIM, BLOCK_K, MASKED).to(DOT)
        v = load_rows(v_ptr, v_row, inside, V_DIM, BLOCK_V, MASKED).to(DOT)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            score = tl.where(inside[None, :], score, float("-inf"))
        if TOGETHER > 1:
            score = tl.where(q_head[:, None] == (tl.arange(0, BLOCK_N) % TOGETHER)[None, :], score, float("-inf"))
        # Every query sees the first token of its KV head, so no maximum stays at -inf.
        new_highest = tl.maximum(highest, tl.max(score, 1))
        p = tl.exp2(score * scale_log2 - (new_highest * scale_log2)[:, None])
        rescale = tl.exp2((highest - new_highest) * scale_log2)
        total = total * rescale + tl.sum(p, 1)
        highest = new_highest
        acc = tl.dot(p.to(DOT), v, acc * rescale[:, None], input_precision="ieee")
    return acc, highest, total, entry


@triton.jit
def combine_splits(
    part_ptr,
    lse_ptr,
    row,
    inside,
    splits,
    V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``[BLOCK_H, BLOCK_V]``: results of all splits of the output rows ``row``, weighted by their shares of the softmax,
    in the order of the splits. What other programs wrote is read past the first-level cache."""
    v_dim = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    for split in range(splits):
        lse = tl.load(lse_ptr + row * splits + split, mask=inside, other=float("-inf"), cache_modifier=".cg")
        highest = tl.maximum(highest, lse)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V], dtype=tl.float32)
    mask = inside[:, None] & (v_dim < V_DIM)[None, :]
    for split in range(splits):
        lse = tl.load(lse_ptr + row * splits + split, mask=inside, other=float("-inf"), cache_modifier=".cg")
        at = part_ptr + (row * splits + split)[:, None] * V_DIM + v_dim[None, :]
        part = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        share = tl.exp2(lse - shift)
        total += share
        # What an empty split's part holds was never written. It is loaded all the same: so no load waits for another.
        acc += tl.where((lse > float("-inf"))[:, None], share[:, None] * part, 0.0)
    return acc / tl.where(total > 0, total, 1.0)[:, None]
