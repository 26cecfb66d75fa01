"""The operations on caches, and the contract of a backend that runs them.

Every operation takes the pool's flat ``uint8`` buffer, a layout and one layer's ordinal, and reads tables as
``hybridcache.kernels.batch`` describes them. Shapes: T tokens, B rows, N table entries, L state layers, H query heads, K key
(and KV) heads, V value heads, D head dim, P rotated pairs, C conv channels (``q | k | v``), W conv kernel width.

Value head ``h`` of a gated delta net uses key head ``h // (V / K)``; query head ``h`` uses KV head ``h // (H / K)``.
A table entry of -1 is never dereferenced; a row whose first entry is -1 is a padding row: nothing is written for it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch

from hybridcache.memory.layout import AttentionLayout, StateLayout


class Caches:
    def __init__(self, backend, buffer, layout):
        self.backend, self.buffer, self.layout = backend, buffer, layout


class Backend(Protocol):
    """One implementation of every cache operation. ``launches`` counts calls by ``operation[implementation]``, so that a
    result can say which code ran, for example ``{"paged_decode[triton]": 96, "paged_prefill[gluon]": 24}``."""

    name: str
    launches: Counter[str]

    def kv_store(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_table_BN: torch.Tensor,
        row_T: torch.Tensor,
        position_T: torch.Tensor,
    ) -> None:
        """Write K and V of every token to its address, as they are."""

    def qk_norm_rope_store(
        self,
        buffer: torch.Tensor,
        layout: AttentionLayout,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        q_weight_D: torch.Tensor,
        k_weight_D: torch.Tensor,
        eps: float,
        cos_TP: torch.Tensor,
        sin_TP: torch.Tensor,
        kv_table_BN: torch.Tensor,
        row_T: torch.Tensor,
        position_T: torch.Tensor,
    ) -> torch.Tensor:
        """Norm of q and k, ``x / rms(x) * (1 + weight)`` over the head dim; rotation of dims ``(i, i + P)`` by the token's
        angle ``i``, dims from ``2 P`` on passing; then :meth:`kv_store`. Arithmetic is at least float32, and each result is
        rounded once to the inputs' dtype. Returns q, ``[T, H, D]`` in its dtype, contiguous."""
        ...

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
        """Attention of one query per row over positions ``0 .. context_len - 1`` (the query's own token is the last and
        already stored). Returns ``[B, H, v_dim]`` in q's dtype."""
        ...

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
        """Causal attention of each row's new tokens over its whole context, which is stored already. Row ``b`` has queries
        ``cu_seqlens[b] .. cu_seqlens[b + 1]``; its query ``i`` is at position ``context_len - query_len + i``.
        Returns ``[T, H, v_dim]`` in q's dtype."""
        ...

    def gdn_decode(
        self,
        buffer: torch.Tensor,
        layout: StateLayout,
        layer: int,
        x_BC: torch.Tensor,
        conv_weight_CW: torch.Tensor,
        a_BV: torch.Tensor,
        b_BV: torch.Tensor,
        a_log_V: torch.Tensor,
        dt_bias_V: torch.Tensor,
        state_table_BL: torch.Tensor,
        position_B: torch.Tensor,
    ) -> torch.Tensor:
        """One token per row through conv, SiLU, q/k l2norm, gates and the delta rule; the state is updated in place in the
        buffer. At position 0 the stored state is not read. Returns ``[B, V, value dim]`` in x's dtype."""
        ...

    def gdn_prefill(
        self,
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
        """A chunk of several tokens per row; ``start_B`` (int32) is the position of each row's first token. Reads the state
        that position ``start - 1`` left (not at ``start = 0``), leaves the state after the last token.
        Returns ``[T, V, value dim]`` in x's dtype."""
        ...

    def block_copy(self, buffer: torch.Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
        """Copy ``num_bytes`` from byte ``src`` to byte ``dst`` for every ``(src, dst, num_bytes)``, in order. Returns the
        bytes moved."""
        ...


def make_backend(name: str, device: str | torch.device, attention: str = "auto") -> Backend:
    """``torch`` (any device), ``triton`` (CUDA), or ``auto``: triton on CUDA, torch elsewhere.

    Args:
        attention: whose attention kernels: ``auto`` (the backend's own) or a name of
            :func:`hybridcache.kernels.registry.attention_backends`.

    Raises:
        UserError: an unknown name, triton without CUDA, or an attention backend that is not installed.
    """
    from hybridcache.errors import bad
    from hybridcache.kernels.registry import with_attention

    on_cuda = torch.device(device).type == "cuda"
    chosen = ("triton" if on_cuda else "torch") if name == "auto" else name
    if chosen == "torch":
        from hybridcache.kernels.torch_backend import TorchBackend

        return with_attention(TorchBackend(), attention, device)
    if chosen == "triton":
        if not on_cuda:
            raise bad("backend", name, f"needs a CUDA device, not {device}; choose torch")
        from hybridcache.kernels.triton_backend import TritonBackend

        return with_attention(TritonBackend(), attention, device)
    raise bad("backend", name, "choose auto, torch or triton")
