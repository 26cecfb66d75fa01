"""Paged attention in PyTorch: store, decode and prefill over the pool's strided views.

Shapes: T tokens, B rows, N table entries, H query heads, K KV heads, D head dim, P rotated pairs; inside a group of rows, R
rows padded to Q queries and L positions.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hybridcache.kernels.caches import AttentionCache
from hybridcache.memory.layout import AttentionLayout

GROUP_SCORES = 1 << 22
"""Query-key pairs of one padded group of rows, at most: longer rows run alone, without a mask where they can."""
GROUP_POSITIONS = 1 << 18
"""Gathered positions of one padded group of rows, at most."""
MASK_QUERIES = 1024
"""Queries per call where the causal mask of a long row has to be written out."""


def kv_store(
    cache: AttentionCache, k_TKD: Tensor, v_TKD: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor
) -> None:
    """Write K and V of every token whose row is no padding row (their positions may be stale and beyond the table)."""
    row_T, position_T = row_T.long(), position_T.long()
    live = (kv_table_BN[row_T, 0] >= 0).nonzero().squeeze(1)
    if live.numel() < row_T.numel():
        row_T, position_T, k_TKD, v_TKD = (x[live] for x in (row_T, position_T, k_TKD, v_TKD))
    entry_T = kv_table_BN[row_T, position_T // cache.layout.tokens_per_entry].long()
    slots = _slots(cache.layout, entry_T, position_T)
    for view, value in zip(cache.views, (k_TKD, v_TKD)):
        view[slots] = value.to(view.dtype)


def _slots(layout: AttentionLayout, entry: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices into the first three dimensions of a cache's views for positions whose table entries are given."""
    block = torch.div(position % layout.tokens_per_entry, layout.kernel_block_tokens, rounding_mode="floor")
    return entry, block, position % layout.kernel_block_tokens


def qk_norm_rope_store(
    cache: AttentionCache, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor,
    eps: float, cos_TP: Tensor, sin_TP: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor,
) -> Tensor:  # fmt: skip
    """q and k normalised and rotated, K and V stored; returns q."""
    k_TKD = norm_rotate(k_TKD, k_weight_D, eps, cos_TP, sin_TP)
    kv_store(cache, k_TKD, v_TKD, kv_table_BN, row_T, position_T)
    return norm_rotate(q_THD, q_weight_D, eps, cos_TP, sin_TP)


def norm_rotate(x_THD: Tensor, weight_D: Tensor, eps: float, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """``x / rms(x) * (1 + weight)``, then dims ``(i, i + P)`` rotated; rounded once, to x's dtype."""
    dtype = torch.promote_types(torch.promote_types(x_THD.dtype, weight_D.dtype), torch.float32)
    normed_THD = F.rms_norm(x_THD.to(dtype), weight_D.shape, 1.0 + weight_D.to(dtype), eps)
    pairs = cos_TP.shape[-1]
    cos_T1P, sin_T1P = cos_TP.unsqueeze(1), sin_TP.unsqueeze(1)
    first, second, rest = normed_THD.split([pairs, pairs, x_THD.shape[-1] - 2 * pairs], dim=-1)
    rotated = (first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P)
    return torch.cat([*rotated, rest], dim=-1).to(x_THD.dtype)


def paged_decode(
    cache: AttentionCache, q_BHD: Tensor, kv_table_BN: Tensor, context_len_B: Tensor, scale: float
) -> Tensor:
    """A prefill of one query per row."""
    offsets = torch.arange(q_BHD.shape[0] + 1, dtype=torch.int32, device=q_BHD.device)
    return paged_prefill(cache, q_BHD, kv_table_BN, offsets, context_len_B, scale)


def paged_prefill(
    cache: AttentionCache, q_THD: Tensor, kv_table_BN: Tensor, cu_seqlens: Tensor, context_len_B: Tensor, scale: float,
    max_query_len: int = 0, max_context_len: int = 0,
) -> Tensor:  # fmt: skip
    """Causal attention of each row's queries, the row's last positions, over its whole stored context.

    Rows of like lengths are padded into groups; a long row is a group of its own and needs no mask where it starts at
    position 0. Padding rows get zeros.
    """
    # A spare row takes what padding queries compute.
    out_THD = q_THD.new_zeros(q_THD.shape[0] + 1, q_THD.shape[1], cache.layout.v_dim)
    rows = context_len_B.shape[0]
    host = torch.cat([cu_seqlens.int(), context_len_B.int(), kv_table_BN[:, 0].int()]).tolist()
    begin, end, context, first = host[:rows], host[1 : rows + 1], host[rows + 1 : 2 * rows + 1], host[2 * rows + 1 :]
    live = [(context[b], end[b] - begin[b], begin[b], b) for b in range(rows) if first[b] >= 0 and end[b] > begin[b]]
    for group in _groups(live):
        if len(group) == 1:
            length, queries, at, row = group[0]
            tables = kv_table_BN[row : row + 1]
            k_RKLD, v_RKLD = _gather(cache, tables, [length], q_THD)
            q_RHQD = rearrange(q_THD[at : at + queries], "q h d -> 1 h q d").to(k_RKLD.dtype)
            out_RHQD = _attend_row(q_RHQD, k_RKLD, v_RKLD, scale)
            out_THD[at : at + queries] = rearrange(out_RHQD, "1 h q d -> q h d").to(out_THD.dtype)
        else:
            _attend_group(out_THD, q_THD, cache, kv_table_BN, group, scale)
    return out_THD[:-1]


def _groups(rows: list[tuple[int, int, int, int]]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Rows ``(context, queries, first token, row)`` in groups that padding at most doubles, within the module's bounds."""
    group: list[tuple[int, int, int, int]] = []
    queries = 0
    for row in sorted(rows, reverse=True):
        wider = max(queries, row[1])
        if group:
            longest, count = group[0][0], len(group) + 1
            uneven = longest > 128 and (2 * row[0] < longest or 2 * min(row[1], queries) < wider)
            full = count * longest > GROUP_POSITIONS or count * longest * wider > GROUP_SCORES
            if uneven or full:
                yield group
                group, wider = [], row[1]
        group.append(row)
        queries = wider
    if group:
        yield group


def _gather(cache: AttentionCache, tables_RN: Tensor, lengths: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """K and V ``[R, K, L, D]`` of positions ``0 .. max(lengths) - 1``, zeros beyond a row's length (what lies there may
    be NaN), in the dtype to compute in: at least float32 on a CPU, the common type of query and pool elsewhere."""
    position_L = torch.arange(max(lengths), device=like.device)
    entry_RL = tables_RN[:, position_L // cache.layout.tokens_per_entry].long()
    beyond_RL = None
    if len(set(lengths)) > 1:
        beyond_RL = position_L >= torch.tensor(lengths, device=like.device).unsqueeze(1)
        entry_RL = entry_RL.masked_fill(beyond_RL, 0)
    slots = _slots(cache.layout, entry_RL, position_L.expand_as(entry_RL))
    found = []
    for view in cache.views:
        x_RLKD = view[slots]
        dtype = like.dtype if x_RLKD.dtype.itemsize == 1 else torch.promote_types(like.dtype, x_RLKD.dtype)
        x_RLKD = x_RLKD.to(torch.promote_types(dtype, torch.float32) if like.device.type == "cpu" else dtype)
        if beyond_RL is not None:
            x_RLKD = x_RLKD.masked_fill_(beyond_RL[..., None, None], 0)
        found.append(rearrange(x_RLKD, "r l k d -> r k l d"))
    return found[0], found[1]


def _attend_row(q_RHQD: Tensor, k_RKLD: Tensor, v_RKLD: Tensor, scale: float) -> Tensor:
    """One row: its Q queries are the last of L positions."""
    queries, length = q_RHQD.shape[2], k_RKLD.shape[2]
    gqa = q_RHQD.shape[1] != k_RKLD.shape[1]
    if queries == 1 or queries == length:
        return F.scaled_dot_product_attention(
            q_RHQD, k_RKLD, v_RKLD, is_causal=queries > 1, scale=scale, enable_gqa=gqa
        )
    if q_RHQD.is_cuda and q_RHQD.dtype.itemsize == 2 and k_RKLD.shape[-1] == v_RKLD.shape[-1]:
        bias = causal_lower_right(queries, length)
        return F.scaled_dot_product_attention(q_RHQD, k_RKLD, v_RKLD, attn_mask=bias, scale=scale, enable_gqa=gqa)
    key = torch.arange(length, device=q_RHQD.device)
    parts = []
    for at in range(0, queries, MASK_QUERIES):
        part = q_RHQD[:, :, at : at + MASK_QUERIES]
        last = torch.arange(length - queries + at, length - queries + at + part.shape[2], device=q_RHQD.device)
        mask = key <= last.unsqueeze(1)
        parts.append(F.scaled_dot_product_attention(part, k_RKLD, v_RKLD, attn_mask=mask, scale=scale, enable_gqa=gqa))
    return torch.cat(parts, dim=2)


def _attend_group(
    out_THD: Tensor, q_THD: Tensor, cache: AttentionCache, kv_table_BN: Tensor, group: list[tuple[int, int, int, int]],
    scale: float,
) -> None:  # fmt: skip
    """Several rows, padded to one number of queries and of positions; the last row of the output takes the padding."""
    lengths, counts, begins, rows = (list(column) for column in zip(*group))
    length_R, count_R, begin_R, row_R = torch.tensor([lengths, counts, begins, rows], device=q_THD.device)
    k_RKLD, v_RKLD = _gather(cache, kv_table_BN[row_R], lengths, q_THD)
    query_Q = torch.arange(max(counts), device=q_THD.device)
    token_RQ = begin_R.unsqueeze(1) + torch.minimum(query_Q, count_R.unsqueeze(1) - 1)
    position_RQ = (length_R - count_R).unsqueeze(1) + query_Q
    position_RQ = torch.minimum(position_RQ, length_R.unsqueeze(1) - 1)
    mask_RQL = torch.arange(max(lengths), device=q_THD.device) <= position_RQ.unsqueeze(2)
    q_RHQD = rearrange(q_THD[token_RQ], "r q h d -> r h q d").to(k_RKLD.dtype)
    gqa = q_RHQD.shape[1] != k_RKLD.shape[1]
    out_RHQD = F.scaled_dot_product_attention(
        q_RHQD, k_RKLD, v_RKLD, attn_mask=mask_RQL.unsqueeze(1), scale=scale, enable_gqa=gqa
    )
    target_RQ = token_RQ.masked_fill(query_Q >= count_R.unsqueeze(1), out_THD.shape[0] - 1)
    out_THD[target_RQ] = rearrange(out_RHQD, "r h q d -> r q h d").to(out_THD.dtype)
