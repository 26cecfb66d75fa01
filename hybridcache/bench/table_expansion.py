"""Table expansion: int32 entries that kernels need beyond those of the block manager, per decode step, and what they cost.

``exclusive`` and ``carve`` are the modes of shared_pool, whose entries are counted while every request grows by one manager
block; ``broadcast`` and ``loop`` build a step's table of kernel blocks from one of manager blocks
(:mod:`hybridcache.bench.table_cost`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hybridcache.bench.case import Case
from hybridcache.bench.table_cost import WAYS, Table, measure_table
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies.shared_pool import SharedPool

ENTRY_BYTES = 4


def expansions(case: Case, seed: int) -> Iterator[dict[str, Any]]:
    """By implementation: ``bytes`` per step, ``seconds`` on the host (None where nothing runs) and ``rel_error``, 0 where the
    entries name the right memory and infinite where they do not."""
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
    """With room for the case's requests and one manager block more for each."""
    dims = case.dims
    kv = AttentionKV(dims.kv_heads, dims.head_dim, dims.head_dim, case.dtype)
    shape = (dims.v_heads, dims.state_dim, dims.state_dim)
    state = RecurrentState(shape, "float32", (2 * dims.k_heads + dims.v_heads) * dims.state_dim, 4, case.dtype)
    kinds = [(None, state)] * dims.linear_layers + [(kv, None)] * dims.attention_layers
    spec = CacheSpec("kernels", tuple(LayerSpec(i, *kind) for i, kind in enumerate(kinds)))
    budget = int(1.5 * len(case.lengths) * spec.request_bytes(max(case.lengths) + 1024))
    return SharedPool(spec, budget, physical=True, mode=mode)


def _counted(case: Case, mode: str) -> dict[str, Any]:
    strategy = _strategy(case, mode)
    steps = strategy.geometry.manager_block_tokens
    for seq_id, length in enumerate(case.lengths):
        if not strategy.admit(seq_id, length):
            raise MemoryError(f"request {seq_id} of {length} tokens does not fit {strategy.budget_bytes} bytes")
    before = strategy.table_entries_appended
    for grown in range(1, steps + 1):
        for seq_id, length in enumerate(case.lengths):
            if not strategy.grow(seq_id, length + grown):
                raise MemoryError(f"request {seq_id} does not grow to {length + grown} tokens")
    appended = strategy.table_entries_appended - before
    # In so many steps every request reaches exactly one more manager block.
    beyond = appended - len(case.lengths)
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
