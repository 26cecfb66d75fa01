"""Where the time of engine steps goes: kernels by class, and the time in which the device waits for the host.

On CUDA from the kernels that the profiler saw, whoever launched them (a replayed graph's kernels are seen one by one). On a
CPU from PyTorch's operators; what is left is Python.
"""

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OURS: dict[str, str] = {
    **dict.fromkeys(("combine_kernel", "hopper_prefill_kernel"), "attention"),
    **dict.fromkeys(("conv_kernel", "ring_kernel", "chunk_kernel", "state_kernel"), "gated delta net"),
    **dict.fromkeys(("hopper_state_kernel", "shared_decode_kernel"), "gated delta net"),
    **dict.fromkeys(("moe_route_kernel", "moe_list_kernel"), "routing"),
    **dict.fromkeys(("sample_part_kernel", "sample_best_kernel"), "sampling"),
}
"""This project's kernels by name, where :data:`CLASSES` would not know them."""
CLASSES: tuple[tuple[str, str], ...] = (
    ("attention", r"paged_decode|paged_prefill|page_tiled|flash|scaled_dot"),
    ("gated delta net", r"gdn|delta"),
    ("KV store", r"kv_store|qk_norm_rope"),
    ("experts", r"group|moe|expert"),
    ("routing", r"sort|radix|topk|searchsorted|softmax|unique|gather_bitonic"),
    ("dense products", r"gemm|gemv|nvjet|cublas|cutlass|matmul|splitk|addmm|::mm|::bmm|linear"),
    ("memory copies", r"memcpy|memset|block_copy|copy_"),
    ("sampling", r"argmax|max_|sample|philox"),
)
"""Class and what names its kernels or operators; the first that matches takes it. Everything else is ``OTHER``."""

OTHER = "norms and element-wise"
IDLE = {"cuda": "device idle", "cpu": "Python"}


@dataclass(frozen=True)
class Part:
    """What one class took of one step, on average."""

    name: str
    seconds: float
    launches: float


@dataclass(frozen=True)
class StepProfile:
    """Mean of ``steps`` consecutive steps; the parts, idle time among them, add up to ``seconds``."""

    steps: int
    seconds: float
    parts: tuple[Part, ...]

    @property
    def idle_fraction(self) -> float:
        """Share of the time in which no kernel ran (on a CPU: no operator)."""
        idle = sum(part.seconds for part in self.parts if part.name in IDLE.values())
        return idle / self.seconds if self.seconds else 0.0


def classify(name: str) -> str:
    """Class of a kernel or operator by its name."""
    if name in OURS:
        return OURS[name]
    return next((found for found, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profile_steps(
    step: Callable[[], object], count: int, device: torch.device, trace: Path | None = None
) -> StepProfile:
    """Run ``step`` ``count`` times under PyTorch's profiler.

    Where kernels overlap, the time is the first one's. The profiler slows the host, so idle time is an upper bound.

    Args:
        step: one engine step; steps should be alike.
        count: how many.
        device: whose time counts.
        trace: write a Chrome trace there.

    Raises:
        RuntimeError: nothing ran on the device.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log would stand among an experiment's tables
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(count):
            step()
        if on_cuda:
            torch.cuda.synchronize(device)
        wall_s = time.perf_counter() - started
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    if on_cuda:
        spans = kernel_spans(profiler)
        if not spans:
            raise RuntimeError("the profiler saw no kernel on the device")
        return summarize(spans, count)
    operators = [(e.key, e.self_cpu_time_total * 1e-6, e.count) for e in profiler.key_averages()]
    return _sum_up([(classify(name), seconds, calls) for name, seconds, calls in operators], wall_s, count, "cpu")


def kernel_spans(profiler: profile) -> list[tuple[float, float, str]]:
    """Kernels that the profiler saw on the device: ``(start, end, name)`` in seconds."""
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [(event.time_range.start * 1e-6, event.time_range.end * 1e-6, event.name) for event in events]


def summarize(spans: Iterable[tuple[float, float, str]], steps: int) -> StepProfile:
    """Profile from kernels ``(start, end, name)`` in seconds: exclusive time by class, and the gaps between them.

    The whole runs from the first kernel's start to the last one's end.
    """
    ordered = sorted(spans)
    found: list[tuple[str, float, float]] = []
    until = ordered[0][0]
    for start, end, name in ordered:
        found.append((classify(name), max(end - max(start, until), 0.0), 1))
        until = max(until, end)
    return _sum_up(found, until - ordered[0][0], steps, "cuda")


def _sum_up(found: Iterable[tuple[str, float, float]], whole_s: float, steps: int, kind: str) -> StepProfile:
    seconds: dict[str, float] = {}
    launches: dict[str, float] = {}
    for name, time_s, count in found:
        seconds[name] = seconds.get(name, 0.0) + time_s
        launches[name] = launches.get(name, 0.0) + count
    whole_s = max(whole_s, sum(seconds.values()))
    parts = [
        Part(name, seconds[name] / steps, launches[name] / steps) for name in sorted(seconds, key=seconds.__getitem__)
    ]
    parts.append(Part(IDLE[kind], (whole_s - sum(seconds.values())) / steps, 0.0))
    return StepProfile(steps, whole_s / steps, tuple(parts))
