"""ReuseTimes: how long after its last use a checkpoint is used again, learnt while requests come.

Checkpoints are put into classes by what tells most about their future: whether their sequence has gone on to a later one,
whether they were ever reused, and the mean (of the logarithm) of the intervals at which their sequence was. For each class,
ages at reuse are counted in buckets that grow by a fifth, beside the number of times that the wait began. The value of keeping
a checkpoint of age ``a`` for a further time ``h`` is the probability that it is reused by then, over the time for which it
is expected to be kept; the best ``h`` is taken (the index of Gittins, 1979; Hit density of Beckmann et al., NSDI 2018, is its
relative with ``h`` unbounded). With a falling hazard this evicts the oldest first, with a period the youngest.
"""

import math

import numpy as np

from hybridcache.prefix.points import Point, Standing

BUCKETS = 40
_FIRST_S = 0.1
_GROWTH = 1.35
_EDGES = np.concatenate([[0.0], _FIRST_S * _GROWTH ** np.arange(BUCKETS)])
"""Seconds; the last edge is some 6 hours."""
INTERVAL_CLASSES = 8
CLASSES = len(Standing) * (1 + INTERVAL_CLASSES)
_ALIKE = 16.0
_SMOOTH = np.array([0.25, 0.5, 0.25])
_REBUILD_EVERY = 64
_HALF_LIFE = 4096
"""Events after which an observation counts half."""


class ReuseTimes:
    """Counts and the table of values made of them."""

    def __init__(self) -> None:
        # A weak prior: log-uniform times, and as many that never come.
        self._reused = np.full((CLASSES, BUCKETS), 1.0 / BUCKETS)
        self._begun = np.full(CLASSES, 2.0)
        self._events = 0
        self._rebuild()

    def begun(self, point: Point) -> None:
        """A wait for reuse begins: the checkpoint was made or touched just now."""
        self._begun[class_of(point)] += 1.0
        self._count()

    def reused(self, point: Point, now_s: float) -> None:
        """A request came that resumes from the checkpoint, or would have if it were alive. To be called before its touch."""
        self._reused[class_of(point), bucket_of(now_s - point.active_s)] += 1.0
        self._count()

    def moved(self, before: int, point: Point) -> None:
        """A checkpoint changed its class without having been reused."""
        self._begun[before] = max(self._begun[before] - 1.0, self._reused[before].sum())
        self._begun[class_of(point)] += 1.0

    def rate(self, point: Point, now_s: float) -> float:
        """Reuses to be expected per second of keeping the checkpoint."""
        return self._table[class_of(point)][bucket_of(now_s - point.active_s)]

    def _count(self) -> None:
        self._events += 1
        if self._events % _REBUILD_EVERY == 0:
            decay = 0.5 ** (_REBUILD_EVERY / _HALF_LIFE)
            self._reused *= decay
            self._begun *= decay
            self._rebuild()

    def _rebuild(self) -> None:
        # A class of few observations is taken to be like all of its kind.
        kinds = self._reused.reshape(len(Standing), -1, BUCKETS), self._begun.reshape(len(Standing), -1)
        all_begun = kinds[1].sum(axis=1, keepdims=True)
        alike = (kinds[0] + _ALIKE * kinds[0].sum(axis=1, keepdims=True) / all_begun[:, :, None]).reshape(-1, BUCKETS)
        reused_CB = np.apply_along_axis(np.convolve, 1, np.pad(alike, ((0, 0), (1, 1)), "edge"), _SMOOTH, "valid")
        begun_C = np.maximum(self._begun + _ALIKE, reused_CB.sum(axis=1) + 1e-9)
        survive = begun_C[:, None] - np.concatenate([np.zeros((CLASSES, 1)), np.cumsum(reused_CB, axis=1)], axis=1)
        kept_CB = (survive[:, :-1] + survive[:, 1:]) / 2 * np.diff(_EDGES)  # expected seconds in each bucket
        table = np.empty((CLASSES, BUCKETS))
        for age in range(BUCKETS):
            gained = np.cumsum(reused_CB[:, age:], axis=1)
            table[:, age] = (gained / np.maximum(np.cumsum(kept_CB[:, age:], axis=1), 1e-12)).max(axis=1)
        self._table: list[list[float]] = table.tolist()


def bucket_of(age_s: float) -> int:
    """The bucket of an age."""
    if age_s <= _FIRST_S:
        return 0
    return min(1 + int(math.log(age_s / _FIRST_S) / math.log(_GROWTH)), BUCKETS - 1)


def class_of(point: Point) -> int:
    """The class of a checkpoint; see the module."""
    known = 0 if point.uses == 0 else 1 + min(int(point.mean_log_interval * 1.25), INTERVAL_CLASSES - 1)
    return known + (1 + INTERVAL_CLASSES) * point.standing
