"""What one layer of a model stores: KV for every token, a state for every request, both or neither."""

from dataclasses import dataclass
from math import prod

from hybridcache.spec.dtypes import itemsize

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
