"""FreeList: the free block numbers of one pool, last in first out, optionally shuffled."""

import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def merged_runs(numbers: Iterable[int] | np.ndarray) -> np.ndarray:
    """Maximal runs of a set of numbers given in any order, as int64 ``[runs, 2]`` of ``(first, count)``."""
    given = numbers.astype(np.int64) if isinstance(numbers, np.ndarray) else np.fromiter(numbers, dtype=np.int64)
    if given.size == 0:
        return np.empty((0, 2), dtype=np.int64)
    low, spread = int(given.min()), int(given.max()) - int(given.min())
    if spread < 16 * given.size:  # marks take a third of a sort's time; pools of single tokens hold very many pages
        marks = np.zeros(spread + 3, dtype=np.int8)
        marks[given - (low - 1)] = 1
        edges = np.flatnonzero(marks[1:] != marks[:-1]).reshape(-1, 2)
        return np.stack([edges[:, 0] + low, edges[:, 1] - edges[:, 0]], axis=1)
    ordered = np.sort(given)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ordered) != 1) + 1])
    counts = np.diff(np.append(starts, ordered.size))
    return np.stack([ordered[starts], counts], axis=1)


def listed_runs(numbers: Sequence[int]) -> list[list[int]]:
    """As :func:`merged_runs`, in ascending order, as a list: without NumPy, whose calls cost more than merging few numbers."""
    if len(numbers) > 64:
        return merged_runs(numbers).tolist()
    runs: list[list[int]] = []
    end: int | None = None
    for number in sorted(numbers):
        if number == end:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
        end = number + 1
    return runs


class FreeList:
    """Free numbers ``first .. first + count - 1``; ``pop`` hands out ascending numbers until some come back.

    Args:
        count: how many numbers.
        first: the lowest of them.
        placement_seed: shuffle the order once, so that tests meet scattered blocks from the start.
    """

    def __init__(self, count: int, first: int = 0, placement_seed: int | None = None) -> None:
        self._free = list(range(first + count - 1, first - 1, -1))
        if placement_seed is not None:
            random.Random(placement_seed).shuffle(self._free)

    def __len__(self) -> int:
        return len(self._free)

    def __iter__(self) -> Iterator[int]:
        return iter(self._free)

    def pop(self) -> int:
        return self._free.pop()

    def take(self, count: int) -> list[int]:
        """``count`` numbers; the caller has checked that they are there."""
        assert count <= len(self._free), (count, len(self._free))
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def put(self, number: int) -> None:
        self._free.append(number)

    def put_all(self, numbers: Sequence[int]) -> None:
        self._free.extend(reversed(numbers))
