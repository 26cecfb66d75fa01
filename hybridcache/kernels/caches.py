"""One layer's cache in a pool, bound once: typed views and strides, so that no launch works them out again.

``AttentionCache`` and ``StateCache`` are the first argument of every implementation of a cache operation. Strided views alias
the pool's bytes: indexing one gathers, assigning to an index scatters, and none is a copy.

Shapes: E table entries that fit the pool, N kernel blocks per entry, S tokens per kernel block, K KV heads, D row width;
V value heads, W conv ring columns, C channels.
"""

from collections import Counter
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from hybridcache.memory.layout import AttentionLayout, StateLayout
from hybridcache.spec.dtypes import torch_dtype


def elements(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole buffer as a flat tensor of ``dtype``; the last bytes that make no element are cut off. No copy."""
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def part(buffer: Tensor, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of ``shape`` that starts at byte ``address`` of the buffer. No copy."""
    return buffer[address : address + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def strided(flat: Tensor, base: int, entry_stride: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """``[E, *shape]`` over a flat typed pool, for as many entries E as fit wholly. ``base``, ``entry_stride`` and ``strides``
    are bytes. Entries may overlap (state tables that count in units smaller than a state); the caller's table says which
    of them are real."""
    size = flat.element_size()
    extent = sum((max(n, 1) - 1) * stride for n, stride in zip(shape, strides)) + size
    entries = max((flat.numel() * size - base - extent) // entry_stride + 1, 0)
    in_elements = tuple(stride // size for stride in (entry_stride, *strides))
    return flat.as_strided((entries, *shape), in_elements, flat.storage_offset() + base // size)


def row_strides(layout: AttentionLayout, layer: int) -> dict[str, int]:
    """Where K and V of a layer lie, in elements, by the name of the kernels' parameters."""
    in_bytes = {
        "base": layout.base[layer], "manager_stride": layout.manager_stride, "kernel_stride": layout.kernel_stride,
        "kv_stride": layout.kv_stride, "k_token_stride": layout.token_stride[0],
        "v_token_stride": layout.token_stride[1], "k_head_stride": layout.head_stride[0],
        "v_head_stride": layout.head_stride[1],
    }  # fmt: skip
    size = torch_dtype(layout.dtype).itemsize
    return {name: value // size for name, value in in_bytes.items()}


class AttentionCache:
    """K and V of attention ordinal ``layer``.

    Args:
        launches: counts what an implementation launches beside its operation.
    """

    def __init__(
        self, buffer: Tensor, layout: AttentionLayout, layer: int, launches: Counter[str] | None = None
    ) -> None:
        self.buffer, self.layout, self.layer = buffer, layout, layer
        self.launches = Counter() if launches is None else launches
        self.pool = elements(buffer, torch_dtype(layout.dtype))
        self.strides = row_strides(layout, layer)
        self.memo: dict[Any, Any] = {}
        """What implementations chose for a shape of inputs."""

    @cached_property
    def views(self) -> tuple[Tensor, Tensor]:
        """K and V, each ``[E, N, S, K, D]``."""
        at = self.layout
        tokens, size = at.kernel_block_tokens, self.pool.element_size()
        k, v = (
            strided(
                self.pool,
                at.base[self.layer] + kv * at.kv_stride,
                at.manager_stride,
                (at.tokens_per_entry // tokens, tokens, at.num_kv_heads, dim),
                (at.kernel_stride, at.token_stride[kv], at.head_stride[kv], size),
            )
            for kv, dim in enumerate((at.k_dim, at.v_dim))
        )
        return k, v

    def row(self, entry: int, position: int, kv: int, head: int) -> Tensor:
        """K (``kv=0``) or V of one position and head, by the layout's formula."""
        dim = self.layout.v_dim if kv else self.layout.k_dim
        return part(self.buffer, self.layout.address(self.layer, entry, position, kv, head), (dim,), self.pool.dtype)


class StateCache:
    """Recurrent states and conv rings of state ordinal ``layer``."""

    def __init__(self, buffer: Tensor, layout: StateLayout, layer: int, launches: Counter[str] | None = None) -> None:
        self.buffer, self.layout, self.layer = buffer, layout, layer
        self.launches = Counter() if launches is None else launches
        self.state = elements(buffer, torch_dtype(layout.recurrent_dtype))
        self.ring = elements(buffer, torch_dtype(layout.conv_dtype))
        sizes = self.state.element_size(), self.ring.element_size()
        self.state_place = layout.base[layer] // sizes[0], layout.stride // sizes[0]
        """Element offset of entry 0's recurrent part and stride of entries, as kernels take them."""
        self.ring_place = (layout.base[layer] + layout.conv_offset) // sizes[1], layout.stride // sizes[1]
        self.memo: dict[Any, Any] = {}
        """What implementations chose for a shape of inputs."""

    @cached_property
    def views(self) -> tuple[Tensor, Tensor]:
        """Recurrent parts ``[E, V, key dim, value dim]`` and conv rings ``[E, W, C]``."""
        at, base = self.layout, self.layout.base[self.layer]
        heads, key_dim, value_dim = at.recurrent_shape
        size, conv_size = self.state.element_size(), self.ring.element_size()
        strides = (key_dim * value_dim * size, value_dim * size, size)
        recurrent = strided(self.state, base, at.stride, (heads, key_dim, value_dim), strides)
        shape, strides_WC = (at.conv_kernel, at.conv_channels), (at.conv_channels * conv_size, conv_size)
        return recurrent, strided(self.ring, base + at.conv_offset, at.stride, shape, strides_WC)

    def stored(self, entry: int) -> tuple[Tensor, Tensor]:
        """The recurrent part ``[V, key dim, value dim]`` and the conv ring ``[W, C]`` of one entry, by the layout's formula."""
        at, address = self.layout, self.layout.address(self.layer, entry)
        shape = (at.conv_kernel, at.conv_channels)
        state = part(self.buffer, address, at.recurrent_shape, self.state.dtype)
        return state, part(self.buffer, address + at.conv_offset, shape, self.ring.dtype)


def cache_of(
    buffer: Tensor, layout: AttentionLayout | StateLayout, layer: int, launches: Counter[str] | None = None
) -> Any:
    """The cache of either kind that a layout describes."""
    kind = AttentionCache if isinstance(layout, AttentionLayout) else StateCache
    return kind(buffer, layout, layer, launches)  # type: ignore[arg-type]
