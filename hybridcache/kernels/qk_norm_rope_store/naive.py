"""Reference of q/k norm, rotary positions and KV store: float64 until each result is rounded once.

Shapes: T tokens, H query heads, K KV heads, D head dim, P rotated pairs (half the rotated dims), B rows, N table entries.
"""

import torch
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.kv_store import naive as kv_store


def norm_rotate(x_THD: Tensor, weight_D: Tensor, eps: float, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """``x / rms(x) * (1 + weight)``, then dims ``(i, i + P)`` rotated; dims from ``2 P`` on pass. Returns float64."""
    x = x_THD.double()
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (1.0 + weight_D.double())
    pairs = cos_TP.shape[-1]
    cos, sin = cos_TP.double()[:, None], sin_TP.double()[:, None]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def qk_norm_rope_store(
    cache: AttentionCache, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor,
    eps: float, cos_TP: Tensor, sin_TP: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor,
) -> Tensor:  # fmt: skip
    """See :func:`hybridcache.kernels.qk_norm_rope_store.triton.qk_norm_rope_store`. Returns float64."""
    k_rotated_TKD = norm_rotate(k_TKD, k_weight_D, eps, cos_TP, sin_TP).to(k_TKD.dtype)
    kv_store.kv_store(cache, k_rotated_TKD, v_TKD, kv_table_BN, row_T, position_T)
    return norm_rotate(q_THD, q_weight_D, eps, cos_TP, sin_TP)
