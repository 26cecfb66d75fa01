"""Copies: manager blocks scattered over the pool, moved inside it and to and from pinned host memory."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.work import Implementation, Setup, Work
from hybridcache.kernels.host_swap.copy_engine import HostPool, HostSwap
from hybridcache.kernels.testing import normal
from hybridcache.kernels.torch_ops.layers import block_copy as torch_copy

POOL_FACTOR = 8
"""Blocks in the pool per block that is moved."""
NONE: Mapping[str, Any] = MappingProxyType({})


def _pool(case: Case, setup: Setup, generator: torch.Generator) -> tuple[torch.Tensor, list[int], list[int]]:
    """A pool of random bytes, and two disjoint lists of its blocks, as many as the case moves."""
    size, count = case.dims.block_bytes, len(case.lengths)
    values = normal(generator, (POOL_FACTOR * count * size // 2,), setup.device, "bfloat16")
    order = torch.randperm(POOL_FACTOR * count, generator=generator).tolist()
    return values.view(torch.uint8), order[:count], order[count : 2 * count]


def copy(case: Case, setup: Setup, more: Mapping[str, Any] = NONE) -> Work:
    """``block_copy``: ``triton`` is the launch alone, its moves on the device already; ``triton+plan`` the whole call.
    ``more``: further tiles by name, for CUDA."""
    size = case.dims.block_bytes
    buffer, sources, targets = _pool(case, setup, setup.generator())
    moves = [(src * size, dst * size, size) for src, dst in zip(sources, targets)]
    blocks, expected = buffer.view(-1, size), buffer.clone()
    expected.view(-1, size)[targets] = blocks[sources]

    def implementation(operation: Callable[[], object], graph: bool = False) -> Implementation:
        def error() -> float:
            blocks[targets] = 0
            operation()
            return 0.0 if torch.equal(buffer, expected) else float("inf")

        return Implementation(lambda _: operation(), error, graph)

    def planned(*tiles: Any) -> Implementation:
        from hybridcache.kernels.block_copy import triton

        batches = triton.plan(buffer, moves)
        return implementation(lambda: triton.run(buffer, buffer, batches, *tiles), True)

    def called() -> Implementation:
        from hybridcache.kernels.block_copy.triton import block_copy

        return implementation(lambda: block_copy(buffer, moves))

    num_bytes = 2 * len(moves) * size
    work = Work(sets=1, footprint=num_bytes, bytes=num_bytes, flops=0)
    if setup.device.type == "cuda":
        work.build.update({"triton": planned, "triton+plan": called})
    if case.with_torch:
        work.build["torch"] = lambda: implementation(lambda: torch_copy(buffer, moves))
    return work.with_more(more, planned)


def swap(case: Case, setup: Setup) -> Work:
    """``swap_out`` and ``swap_in``: blocks to and from scattered slots of pinned memory, through the copy engines."""
    count, size, out = len(case.lengths), case.dims.block_bytes, case.operation == "swap_out"
    generator = setup.generator()
    buffer, blocks, others = _pool(case, setup, generator)
    slots = torch.randperm(2 * count, generator=generator)[:count].tolist()
    host, engine = HostPool(2 * count, size), HostSwap(buffer)
    rows, host_rows = buffer.view(-1, size), host.buffer.view(-1, size)

    def run(_: int) -> None:
        (engine.swap_out(blocks, host, slots) if out else engine.swap_in(host, slots, others)).wait()

    def error() -> float:
        rows[others] = 0
        host_rows[slots] = 0 if out else rows[blocks].to(host_rows.device)
        run(0)
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        moved = host_rows[slots].to(setup.device) if out else rows[others]
        return 0.0 if torch.equal(moved, rows[blocks]) else float("inf")

    build = {"copy_engine": lambda: Implementation(run, error, graph=False)}
    return Work(1, count * size, count * size, 0, build, "to_host" if out else "from_host")
