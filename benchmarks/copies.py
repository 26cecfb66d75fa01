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


def _pool(case: Case, setup: Setup, generator: torch.Generator) -> tuple[torch.Tensor, list[int]]:
    """A pool of random bytes, and its blocks in a random order."""
    size, blocks = case.dims.block_bytes, POOL_FACTOR * len(case.lengths)
    values = normal(generator, (blocks * size // 2,), setup.device, "bfloat16")
    return values.view(torch.uint8), torch.randperm(blocks, generator=generator).tolist()


def copy(case: Case, setup: Setup, more: Mapping[str, Any] = MappingProxyType({})) -> Work:
    """``block_copy``: ``triton`` is the launch alone, its moves on the device already; ``triton+plan`` the whole call.
    ``more``: further tiles by name, for CUDA."""
    count, size = len(case.lengths), case.dims.block_bytes
    buffer, order = _pool(case, setup, setup.generator())
    sources, targets = order[:count], order[count : 2 * count]
    moves = [(src * size, dst * size, size) for src, dst in zip(sources, targets)]
    blocks = buffer.view(-1, size)
    everything = buffer.clone()
    expected = everything.view(-1, size)
    expected[targets] = blocks[sources]

    def implementation(operation: Callable[[], object], graph: bool) -> Implementation:
        def error() -> float:
            blocks[targets] = 0
            operation()
            return 0.0 if torch.equal(buffer, everything) else float("inf")

        return Implementation(lambda _: operation(), error, graph)

    def planned(*tiles: Any) -> Implementation:
        from hybridcache.kernels.block_copy import triton

        batches = triton.plan(buffer, moves)
        return implementation(lambda: triton.run(buffer, buffer, batches, *tiles), True)

    def called() -> Implementation:
        from hybridcache.kernels.block_copy.triton import block_copy

        return implementation(lambda: block_copy(buffer, moves), False)

    work = Work(sets=1, footprint=2 * count * size, bytes=2 * count * size, flops=0)
    if setup.device.type == "cuda":
        work.build.update({"triton": planned, "triton+plan": called})
    if case.with_torch:
        work.build["torch"] = lambda: implementation(lambda: torch_copy(buffer, moves), False)
    return work.with_more(more, planned)


def swap(case: Case, setup: Setup, with_kernel: bool = False) -> Work:
    """``swap_out`` and ``swap_in``: blocks to and from scattered slots of pinned memory, through the copy engines."""
    count, size = len(case.lengths), case.dims.block_bytes
    generator = setup.generator()
    buffer, order = _pool(case, setup, generator)
    blocks, others = order[:count], order[count : 2 * count]
    slots = torch.randperm(2 * count, generator=generator)[:count].tolist()
    host = HostPool(2 * count, size)
    engine = HostSwap(buffer)
    rows = buffer.view(-1, size)

    def out() -> None:
        engine.swap_out(blocks, host, slots).wait()

    def back() -> None:
        engine.swap_in(host, slots, others).wait()

    def wait() -> None:
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)

    def error(out: Callable[[], None] = out, back: Callable[[], None] = back) -> float:
        host.buffer.zero_()
        rows[others] = 0
        out()
        if case.operation == "swap_in":
            wait()
            back()
        wait()
        moved = rows[others] if case.operation == "swap_in" else host.buffer.view(-1, size)[slots].to(setup.device)
        return 0.0 if torch.equal(moved, rows[blocks]) else float("inf")

    def copy_engine() -> Implementation:
        run = out if case.operation == "swap_out" else back
        return Implementation(lambda _: run(), error, graph=False)

    def kernel() -> Implementation:
        """The copy kernel on pinned memory, which the copy engines compete with."""
        from hybridcache.kernels.block_copy import triton

        ends = (buffer, host.buffer) if case.operation == "swap_out" else (host.buffer, buffer)
        places = zip(blocks, slots) if case.operation == "swap_out" else zip(slots, others)
        batches = triton.plan_between(*ends, [(src * size, dst * size, size) for src, dst in places])

        def run(i: int = 0) -> None:
            triton.run(*ends, batches)

        def kernel_error() -> float:
            return error(*((run, back) if case.operation == "swap_out" else (out, run)))

        return Implementation(run, kernel_error, graph=False)

    link = "to_host" if case.operation == "swap_out" else "from_host"
    work = Work(1, count * size, count * size, 0, {"copy_engine": copy_engine}, link)
    if with_kernel:
        work.build["kernel"] = kernel
    return work
