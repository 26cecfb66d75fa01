"""FlashAttention-3 as the attention of a backend, where its package ``flash_attn_interface`` is installed.

It reads pages of any size at any distance, one after another in a page table, so it can express every layout whose kernel
blocks lie at multiples of one stride: a page is a kernel block of one layer. Where a table entry is several kernel blocks,
its table must be expanded to one entry per page: that costs a launch per call and is counted as its own. The argument
names are those of FlashAttention 3.0 (``flash_attn_with_kvcache``).

Shapes: T tokens, B rows, N table entries, H query heads, K KV heads, D head dim.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from hybridcache.errors import bad
from hybridcache.kernels.torch_ops.addressing import strided_view
from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import dtype_name, torch_dtype

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


def check(layout: AttentionLayout, q: torch.Tensor) -> None:
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


class FlashAttention3:
    """Paged decode and prefill through FlashAttention-3. ``launches`` counts ``op[fa3]`` and ``expand_table[fa3]``."""

    def __init__(self, module: Any) -> None:
        """``module`` is ``flash_attn_interface``."""
        self.launches: Counter[str] = Counter()
        self._attend = module.flash_attn_with_kvcache

    def paged_decode(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_BHD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        context_len_B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`.

        Raises:
            UserError: a layout, width or dtype that FlashAttention-3 cannot do.
        """
        check(layout, q_BHD)
        cache = self._cache(buffer, layout, layer, kv_table_BN, context_len_B)
        out_B1HD = self._attend(q_BHD.unsqueeze(1), **cache, softmax_scale=scale, causal=True)
        self.launches["paged_decode[fa3]"] += 1
        return out_B1HD.squeeze(1)

    def paged_prefill(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_THD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        cu_seqlens: torch.Tensor,
        context_len_B: torch.Tensor,
        scale: float,
        max_query_len: int,
        max_context_len: int,
    ) -> torch.Tensor:
        """See :class:`hybridcache.kernels.backend.Backend`. What stands in the output behind the last row is undefined.

        Raises:
            UserError: a layout, width or dtype that FlashAttention-3 cannot do.
        """
        check(layout, q_THD)
        cache = self._cache(buffer, layout, layer, kv_table_BN, context_len_B)
        out_THD = self._attend(
            q_THD,
            **cache,
            cu_seqlens_q=cu_seqlens.int(),
            max_seqlen_q=max_query_len,
            softmax_scale=scale,
            causal=True,
        )
        self.launches["paged_prefill[fa3]"] += 1
        return out_THD

    def _cache(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        kv_table_BN: torch.Tensor,
        context_len_B: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The cache's arguments: K and V by page, the page table, and lengths (0 for padding rows)."""
        at = pages(layout)
        k, v = (
            strided_view(
                buffer,
                torch_dtype(layout.dtype),
                layout.base[layer] + kv * layout.kv_stride,
                at.stride,
                (layout.kernel_block_tokens, layout.num_kv_heads, layout.k_dim),
                (layout.token_stride[kv], layout.head_stride[kv], torch_dtype(layout.dtype).itemsize),
            )
            for kv in range(2)
        )
        table = kv_table_BN
        if at.per_entry > 1:
            inside = torch.arange(at.per_entry, dtype=torch.int32, device=table.device)
            # An entry of -1 becomes negative pages, which no length reaches.
            table = (table.unsqueeze(2) * at.entry_pages + inside).flatten(1)
            self.launches["expand_table[fa3]"] += 1
        length_B = torch.where(kv_table_BN[:, 0] < 0, 0, context_len_B).int()
        return {"k_cache": k, "v_cache": v, "page_table": table.int(), "cache_seqlens": length_B}
