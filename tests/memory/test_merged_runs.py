"""Runs of a set of numbers, found by marks where they lie close and by sorting where they do not."""

import random

import numpy as np
import pytest

from hybridcache.memory.free_list import listed_runs, merged_runs


@pytest.mark.parametrize("reach", [30, 100_000])
def test_runs_cover_exactly_the_numbers(reach: int) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for _ in range(50):
        numbers = rng.sample(range(reach), rng.randint(1, 20))
        runs = merged_runs(numbers)
        assert listed_runs(numbers) == runs.tolist(), seed
        assert runs.dtype == np.int64, seed
        assert sorted(numbers) == [first + i for first, count in runs.tolist() for i in range(count)], seed
        assert all(
            first + count < following for (first, count), (following, _) in zip(runs.tolist(), runs[1:].tolist())
        ), seed


def test_by_hand() -> None:
    assert merged_runs([]).shape == (0, 2)
    assert listed_runs([]) == []
    assert listed_runs(range(100)) == [[0, 100]]
    assert merged_runs([7]).tolist() == [[7, 1]]
    assert merged_runs([3, 1, 2, 9]).tolist() == [[1, 3], [9, 1]]
    assert merged_runs([0, 10**12, 1]).tolist() == [[0, 2], [10**12, 1]]
