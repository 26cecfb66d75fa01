"""Reference of the fused norms, and the implementation wherever Triton does not run. Arithmetic is at least float32.

Shapes: T tokens, D hidden, H heads, E head dim.
"""

import torch
import torch.nn.functional as F


def add_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + delta``, rounded to x's dtype, and of that ``x / rms(x) * (1 + weight)``, rounded to it too."""
    if delta_TD is not None:
        x_TD = x_TD + delta_TD
    return x_TD, F.rms_norm(x_TD.to(weight_D.dtype), weight_D.shape, 1.0 + weight_D, eps).to(x_TD.dtype)


def gated_norm(
    x_THE: torch.Tensor, gate_THE: torch.Tensor, weight_E: torch.Tensor, eps: float, out_THE: torch.Tensor
) -> None:
    """``x / rms(x) * weight * silu(gate)`` over the last dimension, into ``out``."""
    normed = F.rms_norm(x_THE.to(weight_E.dtype), weight_E.shape, weight_E, eps)
    out_THE.copy_(normed * F.silu(gate_THE.to(weight_E.dtype)))


def sigmoid_mul(x_THE: torch.Tensor, gate_THE: torch.Tensor, out_THE: torch.Tensor) -> None:
    """``x * sigmoid(gate)`` into ``out``."""
    torch.mul(x_THE, gate_THE.sigmoid(), out=out_THE)
