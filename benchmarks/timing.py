"""Timing: how long one launch takes, as a median with its spread; and the device's ceilings, by the plainest large operations.

On CUDA, launches that can be captured run as one graph, as an engine's decode step runs them: what is timed is the device,
not the host. Others are timed one by one by events. On a CPU the clock runs around each call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

Run = Callable[[], Any]

WARM_UP = 2
MIN_REPEATS, MAX_REPEATS, TARGET_MS = 5, 30, 200.0
"""Repeats of one measurement: as many as take about ``TARGET_MS`` milliseconds."""


@dataclass(frozen=True)
class Timing:
    """The time of one launch."""

    median_ms: float
    spread: float
    """The middle nine tenths of the repeats (p95 - p5) over their median."""
    launches: int
    """Launches of one repeat."""
    repeats: int
    clock: str
    """``graph``, ``events`` or ``host``."""


def summary(samples_ms: Sequence[float], launches: int, clock: str) -> Timing:
    """Samples are times of all ``launches`` together."""
    p5, p50, p95 = np.percentile(samples_ms, [5, 50, 95])
    return Timing(float(p50) / launches, float((p95 - p5) / p50), launches, len(samples_ms), clock)


def time_host(launches: Sequence[Run], target_ms: float = TARGET_MS) -> Timing:
    """Times launches by the host's clock, after a warm-up."""
    for run in launches:
        run()
    samples: list[float] = []
    while len(samples) < MIN_REPEATS or (len(samples) < MAX_REPEATS and sum(samples) < target_ms):
        started = perf_counter()
        for run in launches:
            run()
        samples.append((perf_counter() - started) * 1e3)
    return summary(samples, len(launches), "host")


def time_events(launches: Sequence[Run], clock: str = "events", count: int | None = None) -> Timing:
    """Times launches by CUDA events around all launches, on the current stream, after a warm-up. ``count``: launches
    that they stand for."""

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for run in launches:
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    estimate = [once() for _ in range(WARM_UP)][-1]
    repeats = int(min(max(TARGET_MS / max(estimate, 1e-3), MIN_REPEATS), MAX_REPEATS))
    return summary([once() for _ in range(repeats)], count or len(launches), clock)


def time_graph(launches: Sequence[Run]) -> Timing:
    """Times launches by events around replays of one CUDA graph of all launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in launches:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in launches:
            run()
    return time_events([graph.replay], "graph", len(launches))


def time_launches(launches: Sequence[Run], device: torch.device, *, graph: bool) -> Timing:
    """The timing that suits the device and what runs on it."""
    if device.type != "cuda":
        return time_host(launches)
    return time_graph(launches) if graph else time_events(launches)


# -- ceilings ------------------------------------------------------------------------------------------------------------

COPY_ELEMENTS = 1 << 30
MATMUL_SIZE = 8192
HOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Ceilings:
    """Rates per second."""

    copy_bytes: float
    """Device-to-device copy of 4 GiB, read plus written."""
    matmul_flops: float
    """bfloat16 matrix product of side 8192, random values."""
    to_host_bytes: float
    from_host_bytes: float
    """One transfer of 256 MiB to and from pinned memory."""


def measure_ceilings() -> Ceilings:
    """Measures all ceilings of the current CUDA device."""
    copy = measure_copy()
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
    matmul = 2 * MATMUL_SIZE**3 / time_events([lambda: a @ b] * 4).median_ms * 1e3
    host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    return Ceilings(copy, matmul, _copy_rate(host, host.to("cuda")), _copy_rate(host.to("cuda"), host))


def measure_copy() -> float:
    """Bytes per second of a device-to-device copy of 4 GiB, read plus written."""
    source = torch.empty(COPY_ELEMENTS, dtype=torch.float32, device="cuda").normal_()
    return 2 * _copy_rate(torch.empty_like(source), source)


def _copy_rate(target: torch.Tensor, source: torch.Tensor) -> float:
    """Bytes copied per second."""
    return source.nbytes / time_events([lambda: target.copy_(source, non_blocking=True)]).median_ms * 1e3
