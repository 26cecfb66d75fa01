"""A layout's formula as strided views of the pool: what the torch operations index instead of computing addresses.

The views alias the pool's bytes; indexing them gathers, assigning to an index scatters. Nothing is copied to make one.
Shapes: E table entries that fit the pool, N kernel blocks per entry, S tokens per kernel block, K KV heads, D row width;
V value heads, W conv ring columns, C channels.
"""

import torch

from hybridcache.memory.layout import AttentionLayout, StateLayout
from hybridcache.spec.dtypes import torch_dtype


def strided_view(
    buffer: torch.Tensor,
    dtype: torch.dtype,
    base: int,
    entry_stride: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> torch.Tensor:
    """``[E, *shape]`` over the flat ``uint8`` buffer, for as many entries E as fit wholly.

    ``base``, ``entry_stride`` and ``strides`` are bytes. Entries may overlap (state tables that count in units smaller
    than a state); the caller's table says which of them are real.
    """
    size = dtype.itemsize
    flat = buffer[: buffer.numel() // size * size].view(dtype)
    extent = sum((max(n, 1) - 1) * stride for n, stride in zip(shape, strides)) + size
    entries = max((buffer.numel() - base - extent) // entry_stride + 1, 0)
    return flat.as_strided(
        (entries, *shape),
        tuple(stride // size for stride in (entry_stride, *strides)),
        flat.storage_offset() + base // size,
    )


def kv_views(buffer: torch.Tensor, layout: AttentionLayout, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one attention ordinal, each ``[E, N, S, K, D]`` in the pool's KV dtype."""
    dtype = torch_dtype(layout.dtype)
    blocks, tokens = layout.tokens_per_entry // layout.kernel_block_tokens, layout.kernel_block_tokens
    k, v = (
        strided_view(
            buffer,
            dtype,
            layout.base[layer] + kv * layout.kv_stride,
            layout.manager_stride,
            (blocks, tokens, layout.num_kv_heads, dim),
            (layout.kernel_stride, layout.token_stride[kv], layout.head_stride[kv], dtype.itemsize),
        )
        for kv, dim in enumerate((layout.k_dim, layout.v_dim))
    )
    return k, v


def kv_slots(
    layout: AttentionLayout, entry: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices into the first three dimensions of :func:`kv_views` for positions whose table entries are given."""
    inside = position % layout.tokens_per_entry
    return (
        entry,
        torch.div(inside, layout.kernel_block_tokens, rounding_mode="floor"),
        position % layout.kernel_block_tokens,
    )


def state_views(buffer: torch.Tensor, layout: StateLayout, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Recurrent part ``[E, V, key dim, value dim]`` and conv ring ``[E, W, C]`` of one state ordinal."""
    heads, key_dim, value_dim = layout.recurrent_shape
    dtype, conv_dtype = torch_dtype(layout.recurrent_dtype), torch_dtype(layout.conv_dtype)
    base = layout.base[layer]
    recurrent = strided_view(
        buffer,
        dtype,
        base,
        layout.stride,
        (heads, key_dim, value_dim),
        (key_dim * value_dim * dtype.itemsize, value_dim * dtype.itemsize, dtype.itemsize),
    )
    ring = strided_view(
        buffer,
        conv_dtype,
        base + layout.conv_offset,
        layout.stride,
        (layout.conv_kernel, layout.conv_channels),
        (layout.conv_channels * conv_dtype.itemsize, conv_dtype.itemsize),
    )
    return recurrent, ring


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any of them is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
