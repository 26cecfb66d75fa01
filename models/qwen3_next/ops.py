"""Operations between the projections that are not cache operations: fused in Triton, or in plain PyTorch.

Which of the two runs follows the backend of the cache operations; nothing falls back from one to the other.
"""

from typing import Any, Protocol

import torch

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.moe import naive as naive_moe
from hybridcache.kernels.norms import naive as naive_norms


class Ops(Protocol):
    """See ``hybridcache.kernels.norms.naive`` and ``hybridcache.kernels.moe.naive`` for what each computes."""

    def add_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def gated_norm(
        self, x_THE: torch.Tensor, gate_THE: torch.Tensor, weight_E: torch.Tensor, eps: float, out_THE: torch.Tensor
    ) -> None: ...

    def sigmoid_mul(self, x_THE: torch.Tensor, gate_THE: torch.Tensor, out_THE: torch.Tensor) -> None: ...

    def silu_mul(self, gate_up_TI: torch.Tensor) -> torch.Tensor: ...

    def route(
        self, logits_TR: torch.Tensor, experts: int, k: int, renormalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def mixture(
        self,
        x_TD: torch.Tensor,
        weight_Ts: torch.Tensor,
        expert_Tk: torch.Tensor,
        gate_up_EID: torch.Tensor,
        down_EDI: torch.Tensor,
        shared_gate_up_JD: torch.Tensor,
        shared_down_DJ: torch.Tensor,
    ) -> torch.Tensor: ...


class TorchOps:
    """PyTorch, on any device and in any dtype. The experts that were hit are counted by the host."""

    add_norm = staticmethod(naive_norms.add_norm)
    gated_norm = staticmethod(naive_norms.gated_norm)
    sigmoid_mul = staticmethod(naive_norms.sigmoid_mul)
    silu_mul = staticmethod(naive_moe.silu_mul)
    route = staticmethod(naive_moe.route)
    mixture = staticmethod(naive_moe.mixture)


class TritonOps:
    """Triton on CUDA. Experts of few tokens are read row by row, those of many multiplied as ``experts`` says, which takes
    bfloat16; other dtypes do as :class:`TorchOps` does.

    Args:
        experts: ``grouped`` for PyTorch's grouped products, ``tiled`` for those in Triton.
    """

    def __init__(self, experts: str = "tiled") -> None:
        from hybridcache.kernels.moe import few_tokens, grouped, routing, tiled
        from hybridcache.kernels.norms import triton as norms

        self._few_tokens = few_tokens
        self._many_tokens = {"grouped": grouped, "tiled": tiled}[experts]
        self.add_norm, self.gated_norm, self.sigmoid_mul = norms.add_norm, norms.gated_norm, norms.sigmoid_mul
        self.silu_mul, self.route = grouped.silu_mul, routing.route

    def mixture(
        self,
        x_TD: torch.Tensor,
        weight_Ts: torch.Tensor,
        expert_Tk: torch.Tensor,
        gate_up_EID: torch.Tensor,
        down_EDI: torch.Tensor,
        shared_gate_up_JD: torch.Tensor,
        shared_down_DJ: torch.Tensor,
    ) -> torch.Tensor:
        matrices = (gate_up_EID, down_EDI, shared_gate_up_JD, shared_down_DJ)
        if x_TD.dtype != torch.bfloat16:
            return naive_moe.mixture(x_TD, weight_Ts, expert_Tk, *matrices)
        same_width = shared_down_DJ.shape[1] == down_EDI.shape[2]
        few = same_width and x_TD.shape[0] <= self._few_tokens.MAX_TOKENS
        way: Any = self._few_tokens if few else self._many_tokens
        return way.mixture(x_TD, weight_Ts, expert_Tk, *matrices)


def ops_for(backend: Backend, dtype: torch.dtype, experts: str = "tiled") -> Ops:
    """Triton's where the backend's own kernels are Triton's, PyTorch's elsewhere and in float64."""
    if backend.name.split("+")[0] == "triton" and dtype != torch.float64:
        return TritonOps(experts)
    return TorchOps()
