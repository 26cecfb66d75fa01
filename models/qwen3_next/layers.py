"""Norms, rotary positions and the dense MLP.

Shapes: T tokens, D hidden or head dim, V value heads, E head dim, I intermediate, P rotated pairs (half the rotated dims).
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.qwen3_next.ops import Ops
from models.qwen3_next.parameters import Slot, Slots, at_least_float32, parameter


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)``: the weight is centred on zero. Computes and keeps its weight in float32 or more."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(dim, dtype=at_least_float32(dtype), device=device)

    def add(self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, ops: Ops) -> tuple[torch.Tensor, torch.Tensor]:
        """``x + delta``, and the norm of that, both in x's dtype. ``delta`` None adds nothing."""
        return ops.add_norm(x_TD, delta_TD, self.weight, self.eps)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield f"{prefix}weight", Slot.of(self.weight)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        self.weight.zero_()


class GatedRMSNorm(nn.Module):
    """``x / rms(x) * weight * silu(gate)``, in float32 or more."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(dim, dtype=at_least_float32(dtype), device=device)

    def forward(self, x_TVE: torch.Tensor, gate_TVE: torch.Tensor, out_TVE: torch.Tensor, ops: Ops) -> None:
        """Normalises the last dimension, into ``out``."""
        ops.gated_norm(x_TVE, gate_TVE, self.weight, self.eps, out_TVE)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield f"{prefix}weight", Slot.of(self.weight)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)


class Rotary(nn.Module):
    """Rotary positions of the first ``2 P`` dims of a head; the others pass."""

    frequency_P: torch.Tensor

    def __init__(self, config: Qwen3NextConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rope, dtype = config.rope_parameters, at_least_float32(dtype)
        dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        if rope["rope_type"] == "default":
            frequency_P, self.scaling = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=dtype) / dim), 1.0
        else:
            frequency_P, self.scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        self.register_buffer("frequency_P", frequency_P.to(device, dtype), persistent=False)

    def forward(self, position_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[T, P]``, in float32 or more."""
        angle = position_T.to(self.frequency_P.dtype)[:, None] * self.frequency_P
        if self.scaling == 1.0:
            return angle.cos(), angle.sin()
        return angle.cos() * self.scaling, angle.sin() * self.scaling


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matrix, gate's rows first."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.gate_up = parameter(2 * intermediate, hidden, dtype=dtype, device=device)
        self.down = parameter(hidden, intermediate, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor, ops: Ops) -> torch.Tensor:
        return F.linear(ops.silu_mul(F.linear(x_TD, self.gate_up)), self.down)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield f"{prefix}gate_proj.weight", Slot.of(self.gate_up[: self.intermediate])
        yield f"{prefix}up_proj.weight", Slot.of(self.gate_up[self.intermediate :])
        yield f"{prefix}down_proj.weight", Slot.of(self.down)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in (self.gate_up, self.down):
            weight.normal_(0.0, std, generator=generator)
