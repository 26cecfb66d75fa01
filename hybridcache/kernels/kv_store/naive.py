"""Reference of the KV store: one row at a time to the address that the layout gives.

Shapes: T tokens, K KV heads, D head dim, B rows, N table entries.
"""

import torch

from hybridcache.kernels.memory import at
from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import torch_dtype


def kv_store(
    buffer: torch.Tensor,
    layout: AttentionLayout,
    layer: int,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    kv_table_BN: torch.Tensor,
    row_T: torch.Tensor,
    position_T: torch.Tensor,
) -> None:
    """See :meth:`hybridcache.kernels.backend.Backend.kv_store`."""
    table, dtype = kv_table_BN.tolist(), torch_dtype(layout.dtype)
    for token, (row, position) in enumerate(zip(row_T.tolist(), position_T.tolist())):
        if table[row][0] == -1:
            continue
        entry = table[row][position // layout.tokens_per_entry]
        if entry == -1:
            continue
        for kv, x_TKD in enumerate((k_TKD, v_TKD)):
            for head in range(layout.num_kv_heads):
                address = layout.address(layer, entry, position, kv, head)
                at(buffer, address, (x_TKD.shape[-1],), dtype).copy_(x_TKD[token, head])
