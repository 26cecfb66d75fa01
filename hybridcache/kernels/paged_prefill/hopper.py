"""Paged prefill for Hopper in Gluon, Triton's language of explicit layouts: one warp group copies, two multiply
(:mod:`.hopper_kernel`)."""

from typing import Any

import torch
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.paged_prefill.hopper_kernel import hopper_prefill_kernel
from hybridcache.kernels.paged_prefill.tiles import Ring, check_inputs, choose_ring
from hybridcache.memory.layout import AttentionLayout

LOG2_E = 1.4426950408889634
QUERIES = 128
"""Of a program: two consumers' 64 rows each."""


def constants(layout: AttentionLayout, num_heads: int, ring: Ring) -> dict[str, Any]:
    """Compile-time parameters of :func:`hopper_prefill_kernel`."""
    return {
        "TM": layout.tokens_per_entry, "KB": layout.kernel_block_tokens, "KV_HEADS": layout.num_kv_heads,
        "GROUP": num_heads // layout.num_kv_heads, "DIM": layout.k_dim, "BLOCK_N": ring.keys, "SLOTS": ring.slots,
        "CONSUMER_REGISTERS": ring.consumer_registers, "PRODUCER_REGISTERS": ring.producer_registers,
    }  # fmt: skip


def paged_prefill(
    cache: AttentionCache, q_THD: Tensor, kv_table_BN: Tensor, cu_seqlens: Tensor, context_len_B: Tensor, scale: float,
    max_query_len: int, max_context_len: int, *, ring: Ring | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`hybridcache.kernels.paged_prefill.triton.paged_prefill`, whose results and errors these are.

    Args:
        ring: :func:`choose_ring` decides where None.

    Raises:
        ValueError: :func:`choose_ring` has none for this layout and these queries.
    """
    layout = cache.layout
    check_inputs(layout, q_THD, scale)
    tokens, num_heads, _ = q_THD.shape
    ring = ring or choose_ring(cache, q_THD)
    if ring is None:
        raise ValueError(
            f"layout of {layout.dtype} K and V, dims {layout.k_dim} and {layout.v_dim}: not for this kernel"
        )
    out_THD = torch.empty((tokens, num_heads, layout.v_dim), dtype=q_THD.dtype, device=q_THD.device)
    rows = context_len_B.shape[0]
    if tokens == 0 or rows == 0 or kv_table_BN.shape[1] == 0:
        return out_THD.zero_()
    tile_tokens = QUERIES // (num_heads // layout.num_kv_heads)
    strides = {name: stride for name, stride in cache.strides.items() if name != "v_token_stride"}
    launcher(hopper_prefill_kernel)[((tokens // tile_tokens + rows + 1) * layout.num_kv_heads,)](
        cache.pool, q_THD, kv_table_BN, cu_seqlens, context_len_B, out_THD, scale * LOG2_E, rows, tokens,
        rows.bit_length(),
        q_THD.stride(0), q_THD.stride(1), kv_table_BN.stride(0),
        **strides, **constants(layout, num_heads, ring), num_warps=4,
    )  # fmt: skip
    return out_THD
