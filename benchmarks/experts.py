"""Experts: what a layer's mixture takes, with routing done before, every launch with a routing of its own.

Shapes: T tokens, D hidden, E experts, I expert intermediate, k experts per token, A = T * k assignments.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.work import Implementation, Setup, Work, loaded, worst
from hybridcache.kernels.moe import router_rows
from hybridcache.kernels.testing import normal
from hybridcache.kernels.torch_ops import layers

ROUTINGS = {"cuda": 10, "cpu": 1}
"""Sets of inputs: by their routings launches read experts from memory and not from the L2 cache."""
CHECKED_TOKENS = 300


def mixture(case: Case, setup: Setup, more: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType({})) -> Work:
    """The mixture of a layer's experts: ``triton`` in tiles, ``grouped`` by PyTorch's grouped products with Triton between
    them, ``torch`` on a CPU. ``more``: further ways, for CUDA."""
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
    ways = {"triton": "moe.tiled", "grouped": "moe.grouped"} if device.type == "cuda" else {"torch": "torch_ops.layers"}
    for name, module in ways.items():
        work.build[name] = partial(loaded, implementation, module, "mixture", device.type == "cuda")
    return work.with_more(more, implementation)
