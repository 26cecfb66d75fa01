"""Reference of GDN prefill: the decode step for one token after the other, the state kept in float64 in between.

Shapes: T tokens, B rows, L state layers, C conv channels, W conv kernel width, V value heads, I key dim, J value dim.
"""

import torch

from hybridcache.kernels.gdn_decode.naive import step, stored_state
from hybridcache.memory.layout import StateLayout


def gdn_prefill(
    buffer: torch.Tensor,
    layout: StateLayout,
    layer: int,
    x_TC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    a_TV: torch.Tensor,
    b_TV: torch.Tensor,
    a_log_V: torch.Tensor,
    dt_bias_V: torch.Tensor,
    state_table_BL: torch.Tensor,
    cu_seqlens: torch.Tensor,
    start_B: torch.Tensor,
) -> torch.Tensor:
    """See :meth:`hybridcache.kernels.backend.Backend.gdn_prefill`. Returns float64."""
    v_heads, _, value_dim = layout.recurrent_shape
    out_TVJ = x_TC.new_zeros((x_TC.shape[0], v_heads, value_dim), dtype=torch.float64)
    entries, offsets = state_table_BL[:, layer].tolist(), cu_seqlens.tolist()
    for b, (entry, start) in enumerate(zip(entries, start_B.tolist())):
        first, last = offsets[b], offsets[b + 1]
        if entry == -1 or first == last:
            continue
        stored_VIJ, ring_WC = stored_state(buffer, layout, layer, entry)
        state_VIJ = stored_VIJ.double() if start > 0 else torch.zeros_like(stored_VIJ, dtype=torch.float64)
        for i, token in enumerate(range(first, last)):
            gates = (a_TV[token], b_TV[token], a_log_V, dt_bias_V)
            out_TVJ[token], state_VIJ = step(state_VIJ, ring_WC, x_TC[token], conv_weight_CW, *gates, start + i)
        stored_VIJ.copy_(state_VIJ)
    return out_TVJ
