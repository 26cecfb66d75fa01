"""Reference of paged prefill: one query at a time, all in float64.

Shapes: T tokens, B rows, H query heads, K KV heads, D head dim, N table entries, S tokens of one request.
"""

import torch
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.paged_decode.naive import gather


def paged_prefill(
    cache: AttentionCache, q_THD: Tensor, kv_table_BN: Tensor, cu_seqlens: Tensor, context_len_B: Tensor, scale: float,
    max_query_len: int, max_context_len: int,
) -> Tensor:  # fmt: skip
    """See :meth:`.AttentionOperations.paged_prefill`. Returns float64."""
    layout = cache.layout
    group = q_THD.shape[1] // layout.num_kv_heads
    out_THD = q_THD.new_zeros((*q_THD.shape[:2], layout.v_dim), dtype=torch.float64)
    table, offsets = kv_table_BN.tolist(), cu_seqlens.tolist()
    for b, context_len in enumerate(context_len_B.tolist()):
        first, last = offsets[b], offsets[b + 1]
        if first == last or table[b][0] == -1:
            continue
        for head in range(layout.num_kv_heads):
            k_SD = gather(cache, table[b], context_len, 0, head)
            v_SD = gather(cache, table[b], context_len, 1, head)
            heads = slice(head * group, (head + 1) * group)
            for token in range(first, last):
                seen = context_len - (last - 1 - token)
                p_GS = torch.softmax(q_THD[token, heads].double() @ k_SD[:seen].T * scale, dim=-1)
                out_THD[token, heads] = p_GS @ v_SD[:seen]
    return out_THD
