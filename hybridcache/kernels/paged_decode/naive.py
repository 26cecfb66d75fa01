"""Reference of paged decode: every row of K and V is read from the address that the layout gives, all in float64.

Shapes: B rows, H query heads, K KV heads, D head dim, N table entries, S tokens of one request.
"""

import torch
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache


def gather(cache: AttentionCache, entries: list[int], num_tokens: int, kv: int, head: int) -> Tensor:
    """K (``kv=0``) or V (``kv=1``) of one head for positions ``0 .. num_tokens - 1``: ``[S, D]``, float64."""
    at, device = cache.layout, cache.buffer.device
    row_bytes = (at.v_dim if kv else at.k_dim) * cache.pool.element_size()
    addresses = [
        at.address(cache.layer, entries[position // at.tokens_per_entry], position, kv, head)
        for position in range(num_tokens)
    ]
    first_S = torch.tensor(addresses, dtype=torch.int64, device=device)
    bytes_SX = cache.buffer[first_S[:, None] + torch.arange(row_bytes, device=device)]
    return bytes_SX.view(cache.pool.dtype).double()


def paged_decode(
    cache: AttentionCache, q_BHD: Tensor, kv_table_BN: Tensor, context_len_B: Tensor, scale: float
) -> Tensor:
    """See :meth:`.AttentionOperations.paged_decode`. Returns float64; padding rows are 0."""
    layout = cache.layout
    group = q_BHD.shape[1] // layout.num_kv_heads
    out_BHD = q_BHD.new_zeros((*q_BHD.shape[:2], layout.v_dim), dtype=torch.float64)
    table = kv_table_BN.tolist()
    for b, num_tokens in enumerate(context_len_B.tolist()):
        if num_tokens == 0 or table[b][0] == -1:
            continue
        for head in range(layout.num_kv_heads):
            k_SD = gather(cache, table[b], num_tokens, 0, head)
            v_SD = gather(cache, table[b], num_tokens, 1, head)
            heads = slice(head * group, (head + 1) * group)
            p_GS = torch.softmax(q_BHD[b, heads].double() @ k_SD.T * scale, dim=-1)
            out_BHD[b, heads] = p_GS @ v_SD
    return out_BHD
