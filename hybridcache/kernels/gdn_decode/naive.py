"""Reference of GDN decode: one token of one request at a time, all in float64.

Shapes: B rows, L state layers, C conv channels (``q | k | v``), W conv kernel width, K key heads, V value heads,
I key dim, J value dim.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_decode import L2NORM_EPS


def _l2norm(x_KI: Tensor) -> Tensor:
    return x_KI * torch.rsqrt((x_KI * x_KI).sum(-1, keepdim=True) + L2NORM_EPS)


def resume(cache: StateCache, source: int, target: int, position: int) -> tuple[Tensor, Tensor]:
    """The state that a step at ``position`` starts from, ``[V, I, J]`` in float64, and the ring ``[W, C]`` that it writes: that
    of entry ``target``, with the inputs before ``position`` in it."""
    stored_VIJ, ring_WC = cache.stored(target)
    if position == 0:
        return torch.zeros_like(stored_VIJ, dtype=torch.float64), ring_WC
    source_VIJ, source_WC = cache.stored(source)
    for past in range(max(position - ring_WC.shape[0] + 1, 0), position):
        ring_WC[past % ring_WC.shape[0]] = source_WC[past % ring_WC.shape[0]]
    return source_VIJ.double(), ring_WC


def step(
    state_VIJ: Tensor, ring_WC: Tensor, x_C: Tensor, conv_weight_CW: Tensor, a_V: Tensor, b_V: Tensor, a_log_V: Tensor,
    dt_bias_V: Tensor, position: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token. ``state_VIJ`` is float64; all of it must be 0 at position 0. Writes ``x_C`` to its ring column.

    Returns:
        The output ``[V, J]`` and the new state ``[V, I, J]``, float64.
    """
    v_heads, key_dim, value_dim = state_VIJ.shape
    k_heads = (x_C.shape[0] - v_heads * value_dim) // (2 * key_dim)
    width = ring_WC.shape[0]

    conv_C = x_C.double() * conv_weight_CW[:, -1].double()
    for back in range(1, min(width - 1, position) + 1):
        conv_C += ring_WC[(position - back) % width].double() * conv_weight_CW[:, width - 1 - back].double()
    ring_WC[position % width] = x_C.to(ring_WC.dtype)

    q_C, k_C, v_C = F.silu(conv_C).split([k_heads * key_dim, k_heads * key_dim, v_heads * value_dim])
    q_KI, k_KI = (_l2norm(rearrange(x_C, "(k i) -> k i", i=key_dim)) for x_C in (q_C, k_C))
    q_VI, k_VI = (repeat(x_KI, "k i -> (k group) i", group=v_heads // k_heads) for x_KI in (q_KI * key_dim**-0.5, k_KI))
    v_VJ = rearrange(v_C, "(v j) -> v j", j=value_dim)

    decay_V = torch.exp(-torch.exp(a_log_V.double()) * F.softplus(a_V.double() + dt_bias_V.double()))
    beta_V = torch.sigmoid(b_V.double())
    decayed_VIJ = state_VIJ * decay_V[:, None, None]
    predicted_VJ = einsum(k_VI, decayed_VIJ, "v i, v i j -> v j")
    delta_VJ = (v_VJ - predicted_VJ) * beta_V[:, None]
    new_VIJ = decayed_VIJ + k_VI[:, :, None] * delta_VJ[:, None, :]
    return einsum(q_VI, new_VIJ, "v i, v i j -> v j"), new_VIJ


def gdn_decode(
    cache: StateCache, x_BC: Tensor, conv_weight_CW: Tensor, a_BV: Tensor, b_BV: Tensor, a_log_V: Tensor,
    dt_bias_V: Tensor, state_read_BL: Tensor, state_write_BL: Tensor, position_B: Tensor,
) -> Tensor:  # fmt: skip
    """See :meth:`.StateOperations.gdn_decode`. Returns float64; padding rows are 0."""
    v_heads, _, value_dim = cache.layout.recurrent_shape
    out_BVJ = x_BC.new_zeros((x_BC.shape[0], v_heads, value_dim), dtype=torch.float64)
    tables = (table_BL[:, cache.layer].tolist() for table_BL in (state_read_BL, state_write_BL))
    for b, (source, target, position) in enumerate(zip(*tables, position_B.tolist())):
        if target == -1:
            continue
        state_VIJ, ring_WC = resume(cache, source, target, position)
        out_BVJ[b], state_VIJ = step(
            state_VIJ, ring_WC, x_BC[b], conv_weight_CW, a_BV[b], b_BV[b], a_log_V, dt_bias_V, position
        )
        cache.stored(target)[0].copy_(state_VIJ)
    return out_BVJ
