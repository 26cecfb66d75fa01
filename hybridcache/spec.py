"""CacheSpec: what a model stores, layer by layer, in bytes.

Everything else (block geometry, strategies, layouts) is computed from a :class:`CacheSpec` alone; nothing downstream
looks at a model configuration. Sizes are those of one tensor-parallel rank.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from hybridcache.dtypes import itemsize

if TYPE_CHECKING:
    import torch

STATE_ALIGNMENT = 128
"""Bytes on which a stored state starts (one L2 line, and what bulk copies and vector loads need)."""


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class AttentionKV:
    """What one attention layer keeps for every token. K and V widths may differ (MLA keeps one latent, ``v_dim=0``)."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.k_dim + self.v_dim) * itemsize(self.dtype)


@dataclass(frozen=True)
class RecurrentState:
    """What one linear layer keeps for every request, whatever its length.

    ``recurrent_shape`` is ``(value heads, key dim, value dim)`` for a gated delta net, ``(heads, head dim, state dim)``
    for Mamba-2, ``()`` where there is no recurrent part. ``conv_channels`` is 0 where there is no convolution.
    """

    recurrent_shape: tuple[int, ...]
    recurrent_dtype: str
    conv_channels: int
    conv_kernel: int
    conv_dtype: str

    @property
    def recurrent_bytes(self) -> int:
        return prod(self.recurrent_shape) * itemsize(self.recurrent_dtype) if self.recurrent_shape else 0

    @property
    def conv_bytes(self) -> int:
        """Exact size: the ``conv_kernel - 1`` previous inputs of every channel."""
        return self.conv_channels * max(self.conv_kernel - 1, 0) * itemsize(self.conv_dtype)

    @property
    def ring_bytes(self) -> int:
        """Size of the ring that our kernels keep: ``conv_kernel`` columns, position ``p`` in column ``p % kernel``."""
        return self.conv_channels * self.conv_kernel * itemsize(self.conv_dtype)

    @property
    def conv_offset(self) -> int:
        """Byte offset of the conv ring inside a stored state."""
        return round_up(self.recurrent_bytes, STATE_ALIGNMENT)

    @property
    def bytes(self) -> int:
        """Exact bytes; what *useful* counts in every strategy."""
        return self.recurrent_bytes + self.conv_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes that a physical layout needs: the ring instead of the exact columns, rounded up to 128 B."""
        return round_up(self.conv_offset + self.ring_bytes, STATE_ALIGNMENT)


@dataclass(frozen=True)
class LayerSpec:
    """One layer's cache: attention KV, a recurrent state, both (Falcon-H1) or neither."""

    index: int
    attention: AttentionKV | None
    state: RecurrentState | None

    @property
    def kind(self) -> str:
        if self.attention and self.state:
            return "hybrid"
        return "attention" if self.attention else "linear" if self.state else "none"


@dataclass(frozen=True)
class CacheSpec:
    """The caches of one model on one tensor-parallel rank. Build it with :meth:`from_config`.

    All attention layers keep the same number of bytes per token, and all states are of the same shape: no supported
    architecture differs, and one block geometry could not serve it.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    tp_size: int = 1

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        kv_dtype: "str | torch.dtype" = "bfloat16",
        state_dtype: "str | torch.dtype" = "float32",
        tp_size: int = 1,
        conv_dtype: "str | torch.dtype | None" = None,
    ) -> "CacheSpec":
        """The caches of a Hugging Face model.

        Args:
            hf_config: a Transformers config, or a mapping of its fields with ``model_type``. Architectures:
                :data:`hybridcache.architectures.ARCHITECTURES`.
            kv_dtype: element type of K and V.
            state_dtype: element type of the recurrent states.
            tp_size: tensor-parallel ranks; the sizes are those of one rank.
            conv_dtype: element type of the convolutions' inputs; ``kv_dtype`` where it is None, or bfloat16 where
                ``kv_dtype`` has one byte (nobody keeps them in fp8).

        Raises:
            UserError: the architecture is not a supported hybrid one, a field is impossible, or ``tp_size`` does not
                divide the heads.
        """
        from hybridcache.architectures import cache_spec

        return cache_spec(hf_config, kv_dtype, state_dtype, tp_size, conv_dtype)

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Model layer indices of the layers with KV, ascending; their order numbers the *attention ordinals*."""
        return tuple(layer.index for layer in self.layers if layer.attention)

    @cached_property
    def state_layers(self) -> tuple[int, ...]:
        """Model layer indices of the layers with a state, ascending; their order numbers the *state ordinals*."""
        return tuple(layer.index for layer in self.layers if layer.state)

    @cached_property
    def attention(self) -> AttentionKV | None:
        return next((layer.attention for layer in self.layers if layer.attention), None)

    @cached_property
    def state(self) -> RecurrentState | None:
        return next((layer.state for layer in self.layers if layer.state), None)

    @cached_property
    def kv_bytes_per_token_per_layer(self) -> int:
        return self.attention.bytes_per_token if self.attention else 0

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """``t``: KV of one token in all attention layers."""
        return self.kv_bytes_per_token_per_layer * len(self.attention_layers)

    @cached_property
    def state_bytes_per_layer(self) -> int:
        """``s``: exact bytes of one layer's state."""
        return self.state.bytes if self.state else 0

    @cached_property
    def stored_state_bytes_per_layer(self) -> int:
        """``s`` with the conv ring's last column and alignment; what a physical layout allots."""
        return self.state.stored_bytes if self.state else 0

    @cached_property
    def state_bytes(self) -> int:
        """``S``: exact bytes of all layers' states of one request."""
        return self.state_bytes_per_layer * len(self.state_layers)

    def request_bytes(self, num_tokens: int) -> int:
        """Exact bytes of a request of ``num_tokens`` tokens: ``S + t * num_tokens``. No allocator can hold less."""
        return self.state_bytes + self.kv_bytes_per_token * num_tokens
