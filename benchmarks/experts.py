"""Experts: what a layer's mixture takes, with routing done before, every launch with a routing of its own.

Shapes: T tokens, D hidden, E experts, I expert intermediate, k experts per token, A = T * k assignments.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.case import Case
from benchmarks.work import Implementation, Setup, Work, loaded, worst
from hybridcache.kernels.moe import router_rows
from hybridcache.kernels.testing import normal
from hybridcache.kernels.torch_ops import layers

ROUTINGS = {"cuda": 10, "cpu": 1}
"""Sets of inputs: by their routings launches read experts from memory and not from the L2 cache."""
CHECKED_TOKENS = 300


def mixture(case: Case, setup: Setup, more: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType({})) -> Work:
    """The mixture of a layer's experts: ``triton`` in tiles, ``torch`` by PyTorch's grouped products and operations between
    them. ``more``: further ways, for CUDA."""
    dims, (tokens,), device = case.dims, case.lengths, setup.device
    generator, inner = setup.generator(), dims.expert_dim
    shapes = ((dims.experts, 2 * inner, dims.hidden), (dims.experts, dims.hidden, inner), (2 * inner, dims.hidden))
    if device.type == "cuda":
        torch.manual_seed(setup.seed)
        matrices = [torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, 0.02) for shape in shapes]
        matrices.append(matrices[1].new_empty((dims.hidden, inner)).normal_(0, 0.02))
    else:
        matrices = [0.02 * normal(generator, shape, device, case.dtype) for shape in (*shapes, (dims.hidden, inner))]

    def inputs() -> tuple[torch.Tensor, ...]:
        logits = normal(generator, (tokens, router_rows(dims.experts)), device, case.dtype)
        x_TD = normal(generator, (tokens, dims.hidden), device, case.dtype)
        return x_TD, *layers.route(logits, dims.experts, dims.top_k, True)

    sets = [inputs() for _ in range(ROUTINGS[device.type] if tokens <= 1024 else 2)]

    @cache
    def expected() -> torch.Tensor:
        """In float64, which takes four times the matrices' memory: only where something is checked."""
        first = [x[:CHECKED_TOKENS] for x in sets[0]]
        exact: list[Any] = [x.double() if x.is_floating_point() else x for x in (*first, *matrices)]
        return layers.mixture(*exact)

    def implementation(operation: Callable[..., torch.Tensor], graph: bool = True) -> Implementation:
        def run(i: int) -> torch.Tensor:
            return operation(*sets[i], *matrices)

        return Implementation(run, lambda: worst([(run(0)[:CHECKED_TOKENS], expected())]), graph)

    distinct = sum(expert_Tk.unique().numel() for _, _, expert_Tk in sets) / len(sets)
    element, parameters = matrices[0].element_size(), 3 * dims.hidden * inner
    moved = int((distinct + 1) * parameters + 2 * tokens * dims.hidden) * element
    work = Work(len(sets), moved, moved, 2 * tokens * (dims.top_k + 1) * parameters)
    if device.type == "cuda":
        work.build["triton"] = partial(loaded, implementation, "moe.tiled", "mixture", True)
        work.build["torch"] = partial(implementation, with_torch_between)
    else:
        work.build["torch"] = partial(loaded, implementation, "torch_ops.layers", "mixture", False)
    return work.with_more(more, implementation)


def with_torch_between(
    x_TD: torch.Tensor, weight_Ts: torch.Tensor, expert_Tk: torch.Tensor, *matrices: Any
) -> torch.Tensor:
    """Grouped products with PyTorch's operations between them."""
    gate_up_EID, down_EDI, shared_gate_up, shared_down = matrices
    tokens, k = expert_Tk.shape
    expert_A, order_A = expert_Tk.flatten().to(torch.int16).sort(stable=True)
    every = torch.arange(gate_up_EID.shape[0], dtype=torch.int16, device=x_TD.device)
    ends = torch.searchsorted(expert_A, every, right=True).int()
    narrow_AI = layers.silu_mul(F.grouped_mm(x_TD[order_A // k], gate_up_EID.mT, offs=ends))
    narrow_AI = narrow_AI * weight_Ts[:, :k].flatten()[order_A].unsqueeze(1).to(x_TD.dtype)
    y_AD = F.grouped_mm(narrow_AI, down_EDI.mT, offs=ends)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(tokens * k, device=x_TD.device)
    shared_TD = F.linear(layers.silu_mul(F.linear(x_TD, shared_gate_up)), shared_down)
    return y_AD[place_A].unflatten(0, (tokens, k)).sum(1) + weight_Ts[:, k:].to(x_TD.dtype) * shared_TD
