"""Rotary positions.

Shapes: T tokens, P rotated pairs (half the rotated dims).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybridcache.errors import bad
from models.layers.parameters import at_least_float32

STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary types whose frequencies do not depend on the sequence: a cached key is rotated once and for all."""


def check_rotary(config: Any) -> None:
    """Refuse rotary positions that a cached key cannot keep.

    Raises:
        UserError: naming the field, the value and what is supported.
    """
    rope = config.rope_parameters
    if rope["rope_type"] not in STATIC_ROPE:
        raise bad("rope_type", rope["rope_type"], f"choose one of {', '.join(STATIC_ROPE)}")
    rotary_dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    if rotary_dim % 2:
        raise bad(
            "partial_rotary_factor", rope.get("partial_rotary_factor"), f"rotates {rotary_dim} of head_dim; even only"
        )


class Rotary(nn.Module):
    """Rotary positions of the first ``2 P`` dims of a head; the others pass."""

    frequency_P: Tensor

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rope, dtype = config.rope_parameters, at_least_float32(dtype)
        dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        if rope["rope_type"] == "default":
            frequency_P, self.scaling = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=dtype) / dim), 1.0
        else:
            frequency_P, self.scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        self.register_buffer("frequency_P", frequency_P.to(device, dtype), persistent=False)

    def forward(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, P]``, in float32 or more."""
        angle = position_T.to(self.frequency_P.dtype)[:, None] * self.frequency_P
        if self.scaling == 1.0:
            return angle.cos(), angle.sin()
        return angle.cos() * self.scaling, angle.sin() * self.scaling
