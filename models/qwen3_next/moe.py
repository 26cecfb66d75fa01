"""Mixture of experts: top-k routing, the experts' matrices, and the shared expert with its gate.

Shapes: T tokens, D hidden, E experts, k experts per token, A = T * k assignments, I expert intermediate.
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3NextConfig

from models.qwen3_next.layers import MLP
from models.qwen3_next.parameters import Slot, Slots, at_least_float32, parameter


class Experts(nn.Module):
    """All experts as two stacks of matrices; ``gate_up`` has gate's rows first."""

    def __init__(self, experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.gate_up = parameter(experts, 2 * intermediate, hidden, dtype=dtype, device=device)
        self.down = parameter(experts, hidden, intermediate, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor, expert_Tk: torch.Tensor, weight_Tk: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, ``[T, D]``.

        Assignments are sorted by expert, so that every expert's are contiguous. On CUDA in bf16 two grouped matrix
        products do all experts without the host knowing their sizes; elsewhere each expert that was hit has its own two.
        """
        tokens, k = expert_Tk.shape
        # 16-bit keys: a radix sort takes a quarter of the passes.
        key = torch.int16 if self.gate_up.shape[0] < 1 << 15 else torch.int32
        expert_A, order_A = expert_Tk.flatten().to(key).sort(stable=True)
        x_AD = x_TD[order_A // k]
        weight_A1 = weight_Tk.flatten()[order_A].unsqueeze(1)
        if x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
            y_AD = self._grouped(x_AD, expert_A, weight_A1)
        else:
            y_AD = self._looped(x_AD, expert_A, weight_A1)
        place_A = torch.empty_like(order_A)
        place_A[order_A] = torch.arange(tokens * k, device=order_A.device)
        return y_AD[place_A].unflatten(0, (tokens, k)).sum(1)

    def _grouped(self, x_AD: torch.Tensor, expert_A: torch.Tensor, weight_A1: torch.Tensor) -> torch.Tensor:
        every = torch.arange(self.gate_up.shape[0], dtype=expert_A.dtype, device=expert_A.device)
        ends = torch.searchsorted(expert_A, every, right=True).int()
        gate, up = F.grouped_mm(x_AD, self.gate_up.mT, offs=ends).chunk(2, dim=1)
        # The routing weight is applied to the narrow side; the product with `down` is linear in it.
        return F.grouped_mm(F.silu(gate) * up * weight_A1, self.down.mT, offs=ends)

    def _looped(self, x_AD: torch.Tensor, expert_A: torch.Tensor, weight_A1: torch.Tensor) -> torch.Tensor:
        y_AD = torch.empty_like(x_AD)
        hit, counts = expert_A.unique_consecutive(return_counts=True)
        begin = 0
        for expert, count in zip(hit.tolist(), counts.tolist()):
            rows = slice(begin, begin + count)
            gate, up = F.linear(x_AD[rows], self.gate_up[expert]).chunk(2, dim=1)
            y_AD[rows] = F.linear(F.silu(gate) * up * weight_A1[rows], self.down[expert])
            begin += count
        return y_AD

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
    """Routed experts plus a shared expert scaled by its own sigmoid gate."""

    def __init__(self, config: Qwen3NextConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.router = parameter(config.num_experts, hidden, dtype=dtype, device=device)
        self.experts = Experts(config.num_experts, hidden, config.moe_intermediate_size, dtype, device)
        self.shared = MLP(hidden, config.shared_expert_intermediate_size, dtype, device)
        self.shared_gate = parameter(1, hidden, dtype=dtype, device=device)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        logits_TE = F.linear(x_TD, self.router)
        weight_Tk, expert_Tk = logits_TE.softmax(-1, dtype=at_least_float32(x_TD.dtype)).topk(self.top_k, dim=-1)
        if self.renormalise:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        routed_TD = self.experts(x_TD, expert_Tk, weight_Tk.to(x_TD.dtype))
        return routed_TD + F.linear(x_TD, self.shared_gate).sigmoid() * self.shared(x_TD)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        yield f"{prefix}gate.weight", Slot.of(self.router)
        yield from self.experts.slots(f"{prefix}experts.", names)
        yield from self.shared.slots(f"{prefix}shared_expert.", names)
        yield f"{prefix}shared_expert_gate.weight", Slot.of(self.shared_gate)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in (self.router, self.shared_gate):
            weight.normal_(0.0, std, generator=generator)
        self.experts.init_weights(std, generator)
        self.shared.init_weights(std, generator)
