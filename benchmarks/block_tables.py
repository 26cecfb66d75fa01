"""Tables: what the host pays to give kernels a table of kernel blocks, given one of manager blocks.

A manager block of ``n`` kernel blocks turns entry ``i`` into ``i n .. i n + n - 1``. Both ways end in the step's staging
buffer, whose bytes are then copied to the device:

- ``loop``: requests one after another, each expanded by itself (vLLM 0.25.1 expands a request's new blocks so);
- ``broadcast``: the whole batch at once, ``ids[:, :, None] * n + arange(n)`` (lmdeploy PR 4421).

:func:`expansions` counts what kernels need beyond the manager's entries per decode step: under shared_pool's two modes, while
every request grows by one manager block, and by the ways above.

Shapes: B requests, N manager blocks of the longest, n kernel blocks in one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.case import Case
from benchmarks.timing import time_host
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec
from hybridcache.strategies.shared_pool import SharedPool

Table = npt.NDArray[np.int32]

TARGET_MS = 20.0
"""Milliseconds that the repeats of one measurement take together, about."""


def loop(ids_BN: Table, n: int, staging_BM: Table) -> None:
    """Request by request."""
    offset_n = np.arange(n, dtype=np.int32)
    for row, ids_N in zip(staging_BM, ids_BN):
        row[:] = (ids_N.reshape(-1, 1) * n + offset_n).reshape(-1)


def broadcast(ids_BN: Table, n: int, staging_BM: Table) -> None:
    """The batch at once."""
    staging_BM[:] = (ids_BN[:, :, None] * n + np.arange(n, dtype=np.int32)).reshape(staging_BM.shape)


WAYS: dict[str, Callable[[Table, int, Table], None]] = {"loop": loop, "broadcast": broadcast}


def measure_table(
    way: str, batch: int, tokens: int, manager_tokens: int, kernel_tokens: int, generator: np.random.Generator
) -> tuple[float, int]:
    """Median seconds of building one step's table for ``batch`` requests of ``tokens`` tokens, and its bytes."""
    n = manager_tokens // kernel_tokens
    blocks = -(-tokens // manager_tokens)
    ids_BN = generator.integers(0, 1 << 20, (batch, blocks), dtype=np.int32)
    staging = np.zeros((batch, blocks * n), dtype=np.int32)
    return time_host([lambda: WAYS[way](ids_BN, n, staging)], TARGET_MS).median_ms * 1e-3, staging.nbytes


# -- expansion -----------------------------------------------------------------------------------------------------------

ENTRY_BYTES = 4


def expansions(case: Case, seed: int) -> Iterator[dict[str, Any]]:
    """One row per implementation: ``bytes`` per step, ``seconds`` on the host (None where nothing runs) and
    ``rel_error``, 0 where the entries name the right memory and infinite where they do not."""
    for mode in ("exclusive", "carve"):
        yield {"impl": mode, **_counted(case, mode)}
    blocks = _strategy(case, "exclusive").geometry
    rows, tokens, generator = len(case.lengths), max(case.lengths), np.random.default_rng(seed)
    sizes = (blocks.manager_block_tokens, blocks.kernel_block_tokens)
    for way in ("broadcast", "loop"):
        seconds, num_bytes = measure_table(way, rows, tokens, *sizes, generator)
        error = _way_error(way, sizes[0] // sizes[1], generator)
        yield {"impl": way, "seconds": seconds, "bytes": num_bytes, "rel_error": error}


def _strategy(case: Case, mode: str) -> SharedPool:
    """A pool with room for the case's requests and one manager block more for each."""
    dims = case.dims
    kv = AttentionKV(dims.kv_heads, dims.head_dim, dims.head_dim, case.dtype)
    kinds: list[Any] = [(None, dims.state("float32"))] * dims.linear_layers + [(kv, None)] * dims.attention_layers
    spec = CacheSpec("kernels", tuple(LayerSpec(i, *kind) for i, kind in enumerate(kinds)))
    budget = int(1.5 * len(case.lengths) * spec.request_bytes(max(case.lengths) + 1024))
    return SharedPool(spec, budget, physical=True, mode=mode)


def _counted(case: Case, mode: str) -> dict[str, Any]:
    """Entries that kernels need beyond the manager's while every request grows by one manager block."""
    strategy = _strategy(case, mode)
    steps = strategy.geometry.manager_block_tokens
    fits = all(strategy.admit(seq_id, length) for seq_id, length in enumerate(case.lengths))
    before = strategy.table_entries_appended
    for grown in range(1, steps + 1):
        fits = fits and all(strategy.grow(seq_id, length + grown) for seq_id, length in enumerate(case.lengths))
    if not fits:
        raise MemoryError(
            f"{len(case.lengths)} requests and a block more of each do not fit {strategy.budget_bytes} bytes"
        )
    beyond = strategy.table_entries_appended - before - len(case.lengths)
    strategy.check_integrity()
    return {"bytes": ENTRY_BYTES * beyond / steps, "seconds": None, "rel_error": _table_error(strategy)}


def _table_error(strategy: SharedPool) -> float:
    """Whether every kernel block of every request lies where no other does, inside the pool."""
    layout = strategy.layout
    at, table_BN = layout.attention, strategy.tables(strategy.residents).kv.astype(np.int64)
    inside = np.arange(at.tokens_per_entry // at.kernel_block_tokens) * at.kernel_stride
    first = table_BN[table_BN >= 0][:, None] * at.manager_stride + inside
    least = min(at.base)
    distinct = np.unique(first).size == first.size
    return 0.0 if distinct and least + first.max() < layout.pool_bytes else float("inf")


def _way_error(way: str, n: int, generator: np.random.Generator) -> float:
    ids_BN: Table = generator.integers(0, 1 << 20, (3, 5), dtype=np.int32)
    staging = np.full((3, 5 * n), -1, dtype=np.int32)
    WAYS[way](ids_BN, n, staging)
    expected = [[entry * n + j for entry in row for j in range(n)] for row in ids_BN.tolist()]
    return 0.0 if staging.tolist() == expected else float("inf")
