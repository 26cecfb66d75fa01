"""Placement: at which positions inside a prompt its states are kept (:class:`~hybridcache.prefix.policy.PrefixPolicy`)."""

from collections.abc import Callable

import numpy as np

POSITION_MULTIPLE = 64
"""A prefill kernel can keep the states at multiples of this position. (A step leaves those at its end, wherever that is.)"""
_CANDIDATES = 192
"""Positions among which ``optimal`` chooses."""


def floor_position(position: int) -> int:
    """The last position up to here at which a prefill kernel can keep states."""
    return position // POSITION_MULTIPLE * POSITION_MULTIPLE


def every_n(start: int, end: int, every: int) -> list[int]:
    """Multiples of ``every`` in ``start + 1 .. end``."""
    return list(range((start // every + 1) * every, end + 1, every))


def log_spaced(start: int, end: int, first: int) -> list[int]:
    """Positions before ``end`` at distances ``first``, twice as much, and so on, down to ``start``."""
    found, distance = [], max(first, POSITION_MULTIPLE)
    while (position := floor_position(end - distance)) > start:
        found.append(position)
        distance *= 2
    return found[::-1]


def uniform(start: int, end: int, count: int) -> list[int]:
    """``count`` positions at even distances between ``start`` and ``end``; fewer where they coincide."""
    found = {floor_position(start + (end - start) * k // (count + 1)) for k in range(1, count + 1)}
    return sorted(position for position in found if position > start)


class PartingDepths:
    """Where later prompts part from earlier ones, as learnt: tokens from the earlier one's end, in buckets that double."""

    BUCKETS = 24

    def __init__(self) -> None:
        self._counts = np.ones(self.BUCKETS)
        """A weak prior: all (doubling) distances alike."""

    def parted(self, distance: int) -> None:
        """A prompt shared all but the last ``distance`` tokens of an earlier sequence."""
        self._counts *= 0.999
        self._counts[min(max(distance, 1).bit_length() - 1, self.BUCKETS - 1)] += 1.0

    def weights(self, distances: np.ndarray) -> np.ndarray:
        """Probability density of parting at these distances (tokens, rising), each times the gap to the next."""
        bucket = np.minimum(np.log2(np.maximum(distances, 1)).astype(int), self.BUCKETS - 1)
        return self._counts[bucket] / self._counts.sum() / 2.0**bucket * np.gradient(distances.astype(float))


def optimal(start: int, end: int, count: int, depths: PartingDepths, work: Callable[[int, int], float]) -> list[int]:
    """The ``count`` positions in ``start + 1 .. end - 1`` that leave the least expected work.

    A later prompt parts at position ``p`` with the learnt probability and computes from the last checkpoint at or before
    ``p``. The best ``m`` positions of which ``j`` is the last follow from the best ``m - 1`` before it: O(N^2 M) for N
    candidate positions, which are multiples of 64 spread evenly over the prompt.
    """
    step = max(POSITION_MULTIPLE, floor_position((end - start) // _CANDIDATES) or POSITION_MULTIPLE)
    candidates = np.arange((start // step + 1) * step, end, step)
    if not len(candidates):
        return []
    at = np.concatenate([[start], candidates])
    weights = depths.weights(np.maximum(end - at, 1)[::-1])[::-1]
    cost = np.array([[work(int(a), int(b)) if b > a else 0.0 for b in at] for a in at[:1]])[0]
    # Work is additive along a sequence: from a to b it is cost[b] - cost[a].
    sums, moments = np.cumsum(weights), np.cumsum(weights * cost)

    def expected(i: np.ndarray, j: int) -> np.ndarray:
        """Expected work of prompts that part from candidate ``i`` on, before candidate ``j``, resuming at ``i``."""
        before = np.where(i > 0, sums[i - 1], 0.0), np.where(i > 0, moments[i - 1], 0.0)
        return (moments[j - 1] - before[1]) - cost[i] * (sums[j - 1] - before[0])

    n, many = len(at), min(count, len(candidates))
    best = np.full((many + 1, n), np.inf)
    came = np.zeros((many + 1, n), dtype=int)
    best[0, 0] = 0.0
    for m in range(1, many + 1):
        for j in range(1, n):
            i = np.arange(j)
            total = best[m - 1, :j] + expected(i, j)
            came[m, j] = int(total.argmin())
            best[m, j] = total[came[m, j]]
    last = np.arange(n)
    tail = (
        best[many]
        + (moments[-1] - np.where(last > 0, moments[last - 1], 0.0))
        - cost[last] * (sums[-1] - np.where(last > 0, sums[last - 1], 0.0))
    )
    j, found = int(tail.argmin()), []
    for m in range(many, 0, -1):
        found.append(int(at[j]))
        j = int(came[m, j])
    return sorted(found)
