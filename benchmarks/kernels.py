"""Timing as two benchmarks of single kernels import it; ``python run.py +experiment=kernels`` is what measures all kernels."""

from collections.abc import Callable
from typing import Any

from hybridcache.bench.ceilings import measure_copy
from hybridcache.bench.timing import time_graph


def graph_ms(launches: list[Callable[[], Any]]) -> float:
    """Median time of one launch among those of one CUDA graph."""
    return time_graph(launches).median_ms


def copy_bandwidth() -> float:
    """Bytes per second of a 4 GiB device-to-device copy, read plus written."""
    return measure_copy()
