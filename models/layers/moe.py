"""The dense MLP, and the mixture of experts: top-k routing, the experts' matrices, the shared expert with its gate.

Shapes: T tokens, D hidden, E experts, R router rows, s weights of a token (its experts' and the shared one's).
"""

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.moe import router_rows
from models.layers.parameters import Slot, Slots, parameter


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matrix, gate's rows first."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.gate_up = parameter(2 * intermediate, hidden, dtype=dtype, device=device)
        self.down = parameter(hidden, intermediate, dtype=dtype, device=device)

    def forward(self, x_TD: Tensor, backend: Backend) -> Tensor:
        return F.linear(backend.silu_mul(F.linear(x_TD, self.gate_up)), self.down)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield f"{prefix}gate_proj.weight", Slot.of(self.gate_up[: self.intermediate])
        yield f"{prefix}up_proj.weight", Slot.of(self.gate_up[self.intermediate :])
        yield f"{prefix}down_proj.weight", Slot.of(self.down)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in (self.gate_up, self.down):
            weight.normal_(0.0, std, generator=generator)


class Experts(nn.Module):
    """All experts as two stacks of matrices; ``gate_up`` has gate's rows first."""

    def __init__(self, experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.gate_up = parameter(experts, 2 * intermediate, hidden, dtype=dtype, device=device)
        self.down = parameter(experts, hidden, intermediate, dtype=dtype, device=device)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        """Fused tensors where the checkpoint has them (Transformers' modules), else three per expert (as published)."""
        if f"{prefix}gate_up_proj" in names or f"{prefix}down_proj" in names:
            yield f"{prefix}gate_up_proj", Slot.of(self.gate_up)
            yield f"{prefix}down_proj", Slot.of(self.down)
            return
        for expert in range(self.gate_up.shape[0]):
            gate, up = self.gate_up[expert].split(self.intermediate)
            yield f"{prefix}{expert}.gate_proj.weight", Slot.of(gate)
            yield f"{prefix}{expert}.up_proj.weight", Slot.of(up)
            yield f"{prefix}{expert}.down_proj.weight", Slot.of(self.down[expert])

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in (self.gate_up, self.down):
            weight.normal_(0.0, std, generator=generator)


class SparseMoe(nn.Module):
    """Routed experts plus a shared expert scaled by its own sigmoid gate.

    ``router`` stacks the experts' rows, the shared expert's gate, and rows of zeros up to a multiple that products like.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, self.num_experts = config.hidden_size, config.num_experts
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.router = parameter(router_rows(self.num_experts), hidden, dtype=dtype, device=device)
        self.router[self.num_experts + 1 :].zero_()
        self.experts = Experts(self.num_experts, hidden, config.moe_intermediate_size, dtype, device)
        self.shared = MLP(hidden, config.shared_expert_intermediate_size, dtype, device)

    def forward(self, x_TD: Tensor, backend: Backend) -> Tensor:
        logits_TR = F.linear(x_TD, self.router)
        weight_Ts, expert_Tk = backend.route(logits_TR, self.num_experts, self.top_k, self.renormalise)
        experts, shared = self.experts, self.shared
        return backend.mixture(x_TD, weight_Ts, expert_Tk, experts.gate_up, experts.down, shared.gate_up, shared.down)

    def _routes(self) -> tuple[Tensor, Tensor]:
        """The router's rows for experts, and for the shared expert's gate."""
        return self.router[: self.num_experts], self.router[self.num_experts : self.num_experts + 1]

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        routed, gate = self._routes()
        yield f"{prefix}gate.weight", Slot.of(routed)
        yield from self.experts.slots(f"{prefix}experts.", names)
        yield from self.shared.slots(f"{prefix}shared_expert.", names)
        yield f"{prefix}shared_expert_gate.weight", Slot.of(gate)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in self._routes():
            weight.normal_(0.0, std, generator=generator)
        self.experts.init_weights(std, generator)
        self.shared.init_weights(std, generator)
