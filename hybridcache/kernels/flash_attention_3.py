"""FlashAttention-3 as the attention of a backend, where its package ``flash_attn_interface`` is installed.

It reads pages of any size at any distance, one after another in a page table, so it can express every layout whose kernel
blocks lie at multiples of one stride: a page is a kernel block of one layer. Where a table entry is several kernel blocks,
its table must be expanded to one entry per page: that costs a launch per call and is counted as its own. The argument
names are those of FlashAttention 3.0 (``flash_attn_with_kvcache``).

Shapes: T tokens, B rows, N table entries, H query heads, K KV heads, D head dim.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.caches import AttentionCache, strided
from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import dtype_name

MAX_HEAD_DIM = 256
FIX = "choose attention_backend=triton"


@dataclass(frozen=True)
class Pages:
    """How a layout looks in pages: ``per_entry`` of them to a table entry, whose first is page ``entry * entry_pages``."""

    stride: int
    """Bytes from one page of a layer to the next."""
    per_entry: int
    entry_pages: int


def pages(layout: AttentionLayout) -> Pages:
    """Raises UserError for a layout that no page stride expresses."""
    blocks = layout.tokens_per_entry // layout.kernel_block_tokens
    if blocks == 1:
        return Pages(layout.manager_stride, 1, 1)
    if layout.kernel_stride <= 0 or layout.manager_stride % layout.kernel_stride:
        raise bad(
            "attention_backend",
            "fa3",
            f"kernel blocks {layout.kernel_stride} B apart in blocks {layout.manager_stride} B apart lie at multiples of "
            f"no one stride; {FIX}",
        )
    return Pages(layout.kernel_stride, blocks, layout.manager_stride // layout.kernel_stride)


def check(layout: AttentionLayout, q: Tensor) -> None:
    """Raises UserError for what FlashAttention-3 cannot compute."""
    name = dtype_name(q.dtype)
    if name not in ("bfloat16", "float16") or name != layout.dtype:
        raise bad("attention_backend", "fa3", f"takes bfloat16 or float16, not {name} with {layout.dtype} KV; {FIX}")
    if layout.k_dim != layout.v_dim or layout.k_dim > MAX_HEAD_DIM:
        raise bad(
            "attention_backend",
            "fa3",
            f"takes K and V of one width up to {MAX_HEAD_DIM}, not {layout.k_dim} and {layout.v_dim}; {FIX}",
        )


def paged_decode(
    cache: AttentionCache, q_BHD: Tensor, kv_table_BN: Tensor, context_len_B: Tensor, scale: float
) -> Tensor:
    """See :meth:`.AttentionOperations.paged_decode`.

    Raises:
        UserError: a layout, width or dtype that FlashAttention-3 cannot do.
    """
    paged = _paged(cache, q_BHD, kv_table_BN, context_len_B)
    return _attend(q_BHD.unsqueeze(1), **paged, softmax_scale=scale, causal=True).squeeze(1)


def paged_prefill(
    cache: AttentionCache, q_THD: Tensor, kv_table_BN: Tensor, cu_seqlens: Tensor, context_len_B: Tensor, scale: float,
    max_query_len: int, max_context_len: int,
) -> Tensor:  # fmt: skip
    """See :meth:`.AttentionOperations.paged_prefill`. What stands in the output behind the last
    row is undefined.

    Raises:
        UserError: a layout, width or dtype that FlashAttention-3 cannot do.
    """
    return _attend(
        q_THD, **_paged(cache, q_THD, kv_table_BN, context_len_B), cu_seqlens_q=cu_seqlens.int(),
        max_seqlen_q=max_query_len, softmax_scale=scale, causal=True,
    )  # fmt: skip


def _attend(q: Tensor, **arguments: Any) -> Tensor:
    """The package is imported at the first call: it is there only where this attention is chosen."""
    from flash_attn_interface import flash_attn_with_kvcache

    return cast(Tensor, flash_attn_with_kvcache(q, **arguments))


def _paged(cache: AttentionCache, q: Tensor, kv_table_BN: Tensor, context_len_B: Tensor) -> dict[str, Tensor]:
    """The cache's arguments: K and V by page, the page table, and lengths (0 for padding rows)."""
    layout, size = cache.layout, cache.pool.element_size()
    check(layout, q)
    at = pages(layout)
    k, v = (
        strided(
            cache.pool,
            layout.base[cache.layer] + kv * layout.kv_stride,
            at.stride,
            (layout.kernel_block_tokens, layout.num_kv_heads, layout.k_dim),
            (layout.token_stride[kv], layout.head_stride[kv], size),
        )
        for kv in range(2)
    )
    table = kv_table_BN
    if at.per_entry > 1:
        inside = torch.arange(at.per_entry, dtype=torch.int32, device=table.device)
        # An entry of -1 becomes negative pages, which no length reaches.
        table = (table.unsqueeze(2) * at.entry_pages + inside).flatten(1)
        cache.launches["expand_table[fa3]"] += 1
    length_B = torch.where(kv_table_BN[:, 0] < 0, 0, context_len_B).int()
    return {"k_cache": k, "v_cache": v, "page_table": table.int(), "cache_seqlens": length_B}
