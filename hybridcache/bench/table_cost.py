"""Table cost: what the host pays to give kernels a table of kernel blocks, given one of manager blocks.

A manager block of ``n`` kernel blocks turns entry ``i`` into ``i n .. i n + n - 1``. All three ways end in the step's
staging buffer, whose bytes are then copied to the device:

- ``loop``: requests one after another, each expanded by itself (vLLM 0.25.1 expands a request's new blocks so);
- ``broadcast``: the whole batch at once, ``ids[:, :, None] * n + arange(n)`` (lmdeploy PR 4421);
- ``none``: kernels read the manager table, so the step copies it as it is.

Shapes: B requests, N manager blocks of the longest, n kernel blocks in one.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int32]

MIN_REPEATS, MAX_REPEATS, TARGET_S = 3, 50, 0.02
"""Repeats of one measurement: as many as take about ``TARGET_S`` seconds."""


def loop(ids_BN: Table, n: int, staging_BM: Table) -> None:
    """Request by request."""
    offset_n = np.arange(n, dtype=np.int32)
    for row, ids_N in zip(staging_BM, ids_BN):
        row[:] = (ids_N.reshape(-1, 1) * n + offset_n).reshape(-1)


def broadcast(ids_BN: Table, n: int, staging_BM: Table) -> None:
    """The batch at once."""
    staging_BM[:] = (ids_BN[:, :, None] * n + np.arange(n, dtype=np.int32)).reshape(staging_BM.shape)


def none(ids_BN: Table, n: int, staging_BN: Table) -> None:
    """No expansion: a copy."""
    staging_BN[:] = ids_BN


WAYS: dict[str, Callable[[Table, int, Table], None]] = {"loop": loop, "broadcast": broadcast, "none": none}


def table_width(way: str, tokens: int, manager_tokens: int, n: int) -> int:
    """Entries of one request's row."""
    blocks = -(-tokens // manager_tokens)
    return blocks if way == "none" else blocks * n


def measure_table(
    way: str, batch: int, tokens: int, manager_tokens: int, kernel_tokens: int, generator: np.random.Generator
) -> tuple[float, int]:
    """Median seconds of building one step's table for ``batch`` requests of ``tokens`` tokens, and its bytes."""
    n = manager_tokens // kernel_tokens
    ids_BN = generator.integers(0, 1 << 20, (batch, -(-tokens // manager_tokens)), dtype=np.int32)
    staging = np.zeros((batch, table_width(way, tokens, manager_tokens, n)), dtype=np.int32)
    build = WAYS[way]
    times: list[float] = []
    while len(times) < MIN_REPEATS or (len(times) < MAX_REPEATS and sum(times) < TARGET_S):
        started = perf_counter()
        build(ids_BN, n, staging)
        times.append(perf_counter() - started)
    return median(times[1:]), staging.nbytes
