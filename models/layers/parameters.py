"""Parameters without gradients, and the slots that checkpoint tensors go into.

A module may keep weights in another order or fused into fewer tensors than a checkpoint does. Each module lists, for
every checkpoint name under its prefix, a :class:`Slot`: the shape to expect and how to write it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Slots = Iterator[tuple[str, "Slot"]]


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes: ``write`` copies a tensor of ``shape``, any dtype or device, into place."""

    shape: tuple[int, ...]
    write: Callable[[Tensor], object]

    @classmethod
    def of(cls, destination: Tensor) -> "Slot":
        """A slot that is a whole tensor, or a view of a part of one."""
        return cls(tuple(destination.shape), destination.copy_)


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter that needs no gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, softmax and gates: float64 stays float64, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
