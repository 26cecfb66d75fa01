"""Reference of the KV store: one row at a time to the address that the layout gives.

Shapes: T tokens, K KV heads, D head dim, B rows, N table entries.
"""

from torch import Tensor

from hybridcache.kernels.caches import AttentionCache


def kv_store(
    cache: AttentionCache, k_TKD: Tensor, v_TKD: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor
) -> None:
    """See :meth:`.AttentionOperations.kv_store`."""
    table = kv_table_BN.tolist()
    for token, (row, position) in enumerate(zip(row_T.tolist(), position_T.tolist())):
        if table[row][0] == -1:
            continue
        entry = table[row][position // cache.layout.tokens_per_entry]
        if entry == -1:
            continue
        for kv, x_TKD in enumerate((k_TKD, v_TKD)):
            for head in range(cache.layout.num_kv_heads):
                cache.row(entry, position, kv, head).copy_(x_TKD[token, head])
