"""Typed views of the pool's flat ``uint8`` buffer."""

from math import prod

import torch


def elements(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole buffer as a flat tensor of ``dtype``; the last bytes that make no element are cut off. No copy."""
    size = dtype.itemsize
    return buffer[: buffer.numel() // size * size].view(dtype)


def at(buffer: torch.Tensor, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of ``shape`` that starts at byte ``address`` of the buffer. No copy: writing to it writes the
    pool."""
    return buffer[address : address + prod(shape) * dtype.itemsize].view(dtype).view(shape)
