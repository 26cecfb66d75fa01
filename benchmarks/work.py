"""Work: what a case needs to run, built on one device: memory, inputs, implementations and the reference to check them by."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.case import Case
from hybridcache.kernels.backend import attention_backends
from hybridcache.kernels.devices import is_hopper
from hybridcache.kernels.operations import OPERATIONS, load
from hybridcache.kernels.testing import rel_error

ROTATION = 3
"""Disjoint sets of memory together exceed the L2 cache by this factor, so that none of a launch's data is left in it."""


@dataclass(frozen=True)
class Setup:
    """Where cases are built."""

    device: torch.device
    seed: int
    l2_bytes: int

    @classmethod
    def on(cls, device: torch.device, seed: int = 0) -> "Setup":
        """A setup with the device's own size of the L2 cache, 0 on a CPU."""
        on_cuda = device.type == "cuda"
        return cls(device, seed, torch.cuda.get_device_properties(device).L2_cache_size if on_cuda else 0)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def sets(self, footprint: int, least: int, most: int) -> int:
        """Disjoint sets of ``footprint`` bytes whose rotation evicts the cache, within bounds; 1 on a CPU."""
        if self.device.type != "cuda":
            return 1
        return min(max(-(-ROTATION * self.l2_bytes // footprint), least), most)


@dataclass(frozen=True)
class Implementation:
    """One way to run the work.

    Attributes:
        run: one launch on a set of memory, given by its number.
        error: relative error of its results against the reference, from the bytes before any launch; NaN where one is NaN.
        graph: whether it can be captured in a CUDA graph.
    """

    run: Callable[[int], Any]
    error: Callable[[], float]
    graph: bool = True


@dataclass(frozen=True)
class Work:
    """A case on a device.

    Attributes:
        sets: disjoint sets of memory; launch ``i`` of a timing works on one of them.
        footprint: distinct bytes that one launch touches.
        bytes: that one launch must move at least, each input read once and each output written once.
        flops: that the operation is made of, by its definition.
        build: implementations by name, each built when its turn comes, so that one that is broken does not hide others.
        link: what bounds its bytes: ``copy`` (device memory), ``to_host`` or ``from_host``.
    """

    sets: int
    footprint: int
    bytes: int
    flops: int
    build: dict[str, Callable[[], Implementation]] = field(default_factory=dict)
    link: str = "copy"

    def offer(
        self, case: Case, setup: Setup, implementation: Callable[..., Implementation],
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Work":  # fmt: skip
        """Itself, with the library's implementations of the case's operation that run there (Triton's and Gluon's kernels,
        PyTorch's, FlashAttention-3 where it is installed), each given to ``implementation``; then ``more``."""
        operation, on_cuda = case.operation, setup.device.type == "cuda"
        known = OPERATIONS[operation]
        modules = {
            "triton": f"{operation}.triton" if on_cuda else None,
            "gluon": "paged_prefill.hopper" if operation == "paged_prefill" and is_hopper(setup.device) else None,
            "torch": known.torch_module if case.with_torch else None,
            "fa3": known.others.get("fa3") if on_cuda and attention_backends()["fa3"] == "installed" else None,
        }
        for name, module in modules.items():
            if module:
                self.build[name] = partial(loaded, implementation, module, operation, name != "torch")
        return self.with_more(more, implementation)

    def with_more(self, more: Mapping[str, Any], implementation: Callable[[Any], Implementation]) -> "Work":
        """Itself, with further implementations: one of each value of ``more``, by its name."""
        self.build.update({name: partial(implementation, value) for name, value in more.items()})
        return self

    def launch_all(self) -> None:
        """Compile, by launching every implementation once. One that fails here fails again where it is measured, and is
        reported there."""
        for build in self.build.values():
            with suppress(Exception):
                build().run(0)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()


def loaded(make: Callable[..., Implementation], module: str, operation: str, graph: bool) -> Implementation:
    """An implementation of a function of one of the library's kernel modules."""
    return make(load(module, operation), graph)


class Saved:
    """Bytes of a buffer, to be put back before each check."""

    def __init__(self, buffer: torch.Tensor, pieces: Sequence[tuple[int, int]]) -> None:
        """``pieces``: first byte and number of bytes of each."""
        self.buffer = buffer
        self.pieces = [(start, buffer[start : start + size].clone()) for start, size in pieces]

    def restore(self) -> None:
        for start, piece in self.pieces:
            self.buffer[start : start + piece.numel()] = piece


def worst(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest relative error of ``(result, reference)`` pairs; NaN where any is NaN."""
    return float(torch.tensor([rel_error(out, reference) for out, reference in pairs]).max())
