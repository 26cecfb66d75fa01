"""Norms: their weights and epsilons. The backend computes them, fused with what stands beside them."""

from collections.abc import Container

import torch
from torch import nn

from models.layers.parameters import Slot, Slots, at_least_float32, parameter


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)``: the weight is centred on zero, and kept in float32 or more."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(dim, dtype=at_least_float32(dtype), device=device)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield f"{prefix}weight", Slot.of(self.weight)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        self.weight.zero_()


class GatedRMSNorm(RMSNorm):
    """``x / rms(x) * weight * silu(gate)``: the weight is centred on one."""

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)
