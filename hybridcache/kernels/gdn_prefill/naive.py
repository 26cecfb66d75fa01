"""Reference of GDN prefill: the decode step for one token after the other, the state kept in float64 in between.

Shapes: T tokens, B rows, L state layers, C conv channels, W conv kernel width, V value heads, I key dim, J value dim.
"""

import torch
from torch import Tensor

from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_decode.naive import resume, step


def gdn_prefill(
    cache: StateCache, x_TC: Tensor, conv_weight_CW: Tensor, a_TV: Tensor, b_TV: Tensor, a_log_V: Tensor,
    dt_bias_V: Tensor, state_read_BL: Tensor, state_write_BL: Tensor, cu_seqlens: Tensor, start_B: Tensor,
    checkpoint_table_BNL: Tensor | None = None, checkpoint_interval: int = 0,
) -> Tensor:  # fmt: skip
    """See :meth:`.StateOperations.gdn_prefill`. Returns float64."""
    v_heads, _, value_dim = cache.layout.recurrent_shape
    out_TVJ = x_TC.new_zeros((x_TC.shape[0], v_heads, value_dim), dtype=torch.float64)
    tables = (table_BL[:, cache.layer].tolist() for table_BL in (state_read_BL, state_write_BL))
    offsets = cu_seqlens.tolist()
    for b, (source, target, start) in enumerate(zip(*tables, start_B.tolist())):
        first, last = offsets[b], offsets[b + 1]
        if target == -1 or first == last:
            continue
        state_VIJ, ring_WC = resume(cache, source, target, start)
        for position, token in enumerate(range(first, last), start):
            gates = (a_TV[token], b_TV[token], a_log_V, dt_bias_V)
            out_TVJ[token], state_VIJ = step(state_VIJ, ring_WC, x_TC[token], conv_weight_CW, *gates, position)
            if checkpoint_table_BNL is not None and (position + 1) % checkpoint_interval == 0:
                rank = (position + 1) // checkpoint_interval - start // checkpoint_interval - 1
                kept_N = checkpoint_table_BNL[b, :, cache.layer].tolist()
                if rank < len(kept_N) and kept_N[rank] != -1:
                    kept_VIJ, kept_WC = cache.stored(kept_N[rank])
                    kept_VIJ.copy_(state_VIJ)
                    kept_WC.copy_(ring_WC)
        cache.stored(target)[0].copy_(state_VIJ)
    return out_TVJ
