"""Pool maps, and the extents they are drawn from: the same bytes as the spans, whoever holds them."""

from itertools import pairwise
from random import Random, randrange

import numpy as np
import pytest

from hybridcache.memory.free_list import merged_runs
from hybridcache.observe.pool_map import KINDS, LEVELS, pool_map, shares
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import STRATEGIES, Strategy, build
from hybridcache.strategies.base import Kind

ATTENTION = AttentionKV(num_kv_heads=1, k_dim=16, v_dim=16, dtype="bfloat16")
STATE = RecurrentState((2, 8, 8), "float32", 32, 4, "bfloat16")
SPEC = CacheSpec(
    "small", tuple(LayerSpec(i, ATTENTION if i % 4 == 3 else None, STATE if i % 4 != 3 else None) for i in range(8))
)


def churned(name: str, rng: Random) -> Strategy:
    """A strategy after random admissions, growth and releases."""
    strategy = build(name, spec=SPEC, budget_bytes=rng.randint(60_000, 400_000))
    for seq_id in range(rng.randint(5, 60)):
        strategy.admit(seq_id, rng.randint(1, 90))
        for resident in strategy.residents:
            if rng.random() < 0.3:
                strategy.grow(resident, strategy.num_tokens(resident) + rng.randint(1, 30))
            elif rng.random() < 0.2:
                strategy.release(resident)
    return strategy


def held_bytes(strategy: Strategy) -> np.ndarray:
    """The kind of every byte of the budget, from the spans."""
    kinds = np.full(strategy.budget_bytes, Kind.FREE, dtype=np.int8)
    for span in strategy.spans():
        kinds[span.offset : span.offset + span.num_bytes] = span.kind
    return kinds


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "byte_exact"])
def test_extents_are_the_bytes_of_the_spans(name: str) -> None:
    seed = randrange(1 << 30)
    strategy = churned(name, Random(seed))
    expected, found = held_bytes(strategy), np.full(strategy.budget_bytes, Kind.FREE, dtype=np.int8)
    for kind, extents in strategy.extents().items():
        for offset, num_bytes in extents:
            assert (found[offset : offset + num_bytes] == Kind.FREE).all(), (name, seed)
            found[offset : offset + num_bytes] = kind
    assert (found == expected).all(), (name, seed)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "byte_exact"])
def test_map_shows_the_share_of_every_kind_in_every_slice(name: str) -> None:
    seed = randrange(1 << 30)
    rng = Random(seed)
    strategy, cells = churned(name, rng), rng.randint(1, 40)
    kinds = held_bytes(strategy)
    edges = np.linspace(0, strategy.budget_bytes, cells + 1)
    drawn = pool_map(strategy, cells)
    assert set(drawn) == set(KINDS) >= {kind.name.lower() for kind in Kind} - {"free"}
    for kind in set(Kind) - {Kind.FREE}:
        found = shares(drawn[kind.name.lower()])
        assert len(found) == cells
        covered = np.r_[0, np.cumsum(kinds == kind)]
        # Slices need not begin and end on a byte: between two bytes the covered ones grow linearly.
        expected = np.diff(np.interp(edges, np.arange(len(covered)), covered)) / np.diff(edges)
        assert np.abs(found - expected).max() <= 0.5 / LEVELS + 1e-9, (name, seed, kind)


def test_map_of_an_empty_pool_and_of_slices_that_hold_two_kinds() -> None:
    empty = pool_map(build("shared_pool", spec=SPEC, budget_bytes=200_000), 7)
    assert set(empty.values()) == {"a" * 7}
    strategy = build("two_ended", spec=SPEC, budget_bytes=200_000)
    strategy.admit(0, 40)
    whole = pool_map(strategy, 1)
    usage = strategy.usage()
    assert shares(whole["state"])[0] == pytest.approx(usage.state_bytes / 200_000, abs=0.5 / LEVELS)
    assert shares(whole["kv"])[0] == pytest.approx(usage.kv_bytes / 200_000, abs=0.5 / LEVELS)


def test_runs() -> None:
    seed = randrange(1 << 30)
    rng = Random(seed)
    numbers = rng.sample(range(60), rng.randint(0, 60))
    merged = merged_runs(numbers)
    assert [n for first, count in merged for n in range(first, first + count)] == sorted(numbers), seed
    assert all(before.sum() < after[0] for before, after in pairwise(merged)), seed
