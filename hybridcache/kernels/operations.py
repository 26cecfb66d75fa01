"""The operations that a model calls: what each takes and leaves, and which function computes it under which backend.

The protocols are the contracts; :data:`OPERATIONS` names the implementations. A new operation is one method here, one entry,
its naive reference, its kernel and its test. The implementation of a cache operation takes the layer's
:class:`~hybridcache.kernels.caches.AttentionCache` or :class:`~hybridcache.kernels.caches.StateCache` before the arguments
below; :meth:`hybridcache.kernels.backend.Backend.bind` supplies it.

Shapes: T tokens, B rows, N table entries, L state layers, H query heads, K key (and KV) heads, V value heads, D head or hidden
dim, P rotated pairs, C conv channels (``q | k | v``), W conv kernel width, R rows that sample; E experts, k of them per token,
s = k + 1 weights, I and J intermediate dims of routed and shared experts.

Value head ``h`` of a gated delta net uses key head ``h // (V / K)``; query head ``h`` uses KV head ``h // (H / K)``.
A table entry of -1 is never dereferenced; a row whose first entry is -1 is a padding row: nothing is written for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor


class AttentionOperations(Protocol):
    """Operations on the K and V of one attention layer."""

    def kv_store(self, k_TKD: Tensor, v_TKD: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor) -> None:
        """Write K and V of every token to its address, as they are."""

    def qk_norm_rope_store(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, eps: float,
        cos_TP: Tensor, sin_TP: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor,
    ) -> Tensor:  # fmt: skip
        """Norm of q and k, ``x / rms(x) * (1 + weight)`` over the head dim; rotation of dims ``(i, i + P)`` by the token's
        angle ``i``, dims from ``2 P`` on passing; then :meth:`kv_store`. Arithmetic is at least float32, and each result is
        rounded once to the inputs' dtype. Returns q, ``[T, H, D]`` in its dtype, contiguous."""
        ...

    def paged_decode(self, q_BHD: Tensor, kv_table_BN: Tensor, context_len_B: Tensor, scale: float) -> Tensor:
        """Attention of one query per row over positions ``0 .. context_len - 1`` (the query's own token is the last and
        already stored). Returns ``[B, H, v_dim]`` in q's dtype; padding rows are 0."""
        ...

    def paged_prefill(
        self, q_THD: Tensor, kv_table_BN: Tensor, cu_seqlens: Tensor, context_len_B: Tensor, scale: float,
        max_query_len: int, max_context_len: int,
    ) -> Tensor:  # fmt: skip
        """Causal attention of each row's new tokens over its whole context, which is stored already. Row ``b`` has queries
        ``cu_seqlens[b] .. cu_seqlens[b + 1]``; its query ``i`` is at position ``context_len - query_len + i``.
        Returns ``[T, H, v_dim]`` in q's dtype; padding rows, and tokens behind the last row, are 0."""
        ...


class StateOperations(Protocol):
    """Operations on the recurrent states and conv rings of one gated delta net.

    A row's state is read from the block that ``state_read_BL`` names and written, whole, to the one that ``state_write_BL``
    names. Equal entries update it in place. Where they differ, the block read is left as it is, and the block written holds
    afterwards all that a later step reads: the state and the ring columns of the last ``W - 1`` inputs. At position 0 nothing
    is read. Within a call a block that is written may be read by its own row only; several rows may read one block that
    none writes. A padding row has -1 in both tables.
    """

    def gdn_decode(
        self, x_BC: Tensor, conv_weight_CW: Tensor, a_BV: Tensor, b_BV: Tensor, a_log_V: Tensor, dt_bias_V: Tensor,
        state_read_BL: Tensor, state_write_BL: Tensor, position_B: Tensor,
    ) -> Tensor:  # fmt: skip
        """One token per row through conv, SiLU, q/k l2norm, gates and the delta rule. Returns ``[B, V, value dim]`` in x's
        dtype; padding rows are 0."""
        ...

    def gdn_prefill(
        self, x_TC: Tensor, conv_weight_CW: Tensor, a_TV: Tensor, b_TV: Tensor, a_log_V: Tensor, dt_bias_V: Tensor,
        state_read_BL: Tensor, state_write_BL: Tensor, cu_seqlens: Tensor, start_B: Tensor,
        checkpoint_table_BNL: Tensor | None = None, checkpoint_interval: int = 0,
    ) -> Tensor:  # fmt: skip
        """A chunk of several tokens per row; ``start_B`` (int32) is the position of each row's first token. Reads the state
        that position ``start - 1`` left, writes the one after the last token.

        Args:
            checkpoint_table_BNL: int32 ``[B, N, L]``, the block that keeps the state (ring included) at position
                ``(start // interval + 1 + n) * interval``, -1 for none. Positions beyond a row's last token are ignored. No row
                of the call may read or write these blocks otherwise.
            checkpoint_interval: tokens, a multiple of :data:`CHECKPOINT_MULTIPLE`; read only where there is a table.

        Returns:
            ``[T, V, value dim]`` in x's dtype; padding rows, and tokens behind the last row, are 0.

        Raises:
            UserError: an interval that is no such multiple.
        """
        ...


class LayerOperations:
    """What a layer computes between its projections, the greedy choice of tokens, and copies of blocks. A backend sets each
    to its implementation."""

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``x + delta``, rounded to x's dtype, and of that ``x / rms(x) * (1 + weight)``, rounded to it too."""
        raise NotImplementedError

    def gated_norm(self, x_THE: Tensor, gate_THE: Tensor, weight_E: Tensor, eps: float, out_THE: Tensor) -> None:
        """``x / rms(x) * weight * silu(gate)`` over the last dimension, into ``out``."""
        raise NotImplementedError

    def sigmoid_mul(self, x_THE: Tensor, gate_THE: Tensor, out_THE: Tensor) -> None:
        """``x * sigmoid(gate)`` into ``out``."""
        raise NotImplementedError

    def silu_mul(self, gate_up_TI: Tensor) -> Tensor:
        """``silu(gate) * up`` of rows that hold gate, then up."""
        raise NotImplementedError

    def route(self, logits_TR: Tensor, experts: int, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        """Softmax and top-k of the first ``experts`` logits, and the shared expert's gate.

        Returns:
            Weights ``[T, k + 1]``, float32 or float64: of the chosen experts, summing to 1 with ``renormalise``, then the
            sigmoid of logit ``experts``. Expert ids ``[T, k]``, int32, most likely first.
        """
        raise NotImplementedError

    def mixture(
        self, x_TD: Tensor, weight_Ts: Tensor, expert_Tk: Tensor, gate_up_EID: Tensor, down_EDI: Tensor,
        shared_gate_up_JD: Tensor, shared_down_DJ: Tensor,
    ) -> Tensor:  # fmt: skip
        """Weighted sum of each token's experts and the shared one, ``[T, D]``. Gate's rows come before up's."""
        raise NotImplementedError

    def greedy(self, logits_RV: Tensor, sampled_R: Tensor, feed_R: Tensor) -> None:
        """The most likely token of each row, the first of equals. Nothing waits for the device.

        Args:
            logits_RV: of any floating dtype.
            sampled_R: int64; takes the tokens, :data:`~hybridcache.kernels.greedy.NOT_FINITE` where there is none.
            feed_R: int64; takes the tokens, 0 where there is none, for the next step to read.
        """
        raise NotImplementedError

    def block_copy(self, buffer: Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
        """Copy ``num_bytes`` from byte ``src`` to byte ``dst`` for every ``(src, dst, num_bytes)``, in order. Returns the
        bytes moved."""
        raise NotImplementedError


CHECKPOINT_MULTIPLE = 64
"""Positions at which a prefill can keep a state are multiples of this."""
FLOAT32_OR_LESS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operation:
    """Who computes one operation: the module, below this package, that holds a function of the operation's name."""

    torch_module: str
    triton_module: str
    others: dict[str, str] = field(default_factory=dict)
    """Attention backends beside the two, by name."""
    two_kernels: bool = False
    """Triton's implementation is one of :mod:`hybridcache.kernels.choices`, which also says which of two kernels ran."""
    triton_dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes of the first argument that Triton takes; any where empty."""


FA3 = {"fa3": "flash_attention_3"}
ATTENTION = {
    "kv_store": Operation("torch_ops.attention", "kv_store.triton"),
    "qk_norm_rope_store": Operation("torch_ops.attention", "qk_norm_rope_store.triton"),
    "paged_decode": Operation("torch_ops.attention", "paged_decode.triton", FA3, False, FLOAT32_OR_LESS),
    "paged_prefill": Operation("torch_ops.attention", "choices", FA3, True, FLOAT32_OR_LESS),
}
STATE = {
    "gdn_decode": Operation("torch_ops.gated_delta_net", "choices", two_kernels=True),
    "gdn_prefill": Operation("torch_ops.gated_delta_net", "choices", {}, True, FLOAT32_OR_LESS),
}
LAYER = {
    "add_norm": Operation("torch_ops.layers", "norms.triton"),
    "gated_norm": Operation("torch_ops.layers", "norms.triton"),
    "sigmoid_mul": Operation("torch_ops.layers", "norms.triton"),
    "silu_mul": Operation("torch_ops.layers", "moe.silu_mul"),
    "route": Operation("torch_ops.layers", "moe.routing"),
    "mixture": Operation("torch_ops.layers", "moe.mixture"),
    "greedy": Operation("torch_ops.layers", "greedy.triton"),
}
BLOCK_COPY = Operation("torch_ops.layers", "block_copy.triton")
OPERATIONS = {**ATTENTION, **STATE, **LAYER, "block_copy": BLOCK_COPY}


def load(module: str, name: str) -> Callable[..., Any]:
    """A function of one of this package's modules, imported now."""
    return getattr(import_module(f"hybridcache.kernels.{module}"), name)
