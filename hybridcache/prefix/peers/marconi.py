"""MarconiPrefix: Marconi's prefix caching (Pan et al., MLSys 2025, arXiv 2411.19379), over byte_exact.

* Admission: about two checkpoints a request, where its prompt parts from an earlier one (from the second sight on, at a
  multiple of 64 here), and where it ends.
* Eviction: of the nodes with at most one child, the one of least ``recency + alpha * efficiency``. Recency is the time
  of its last use, efficiency the FLOPs that it saves beyond the checkpoint before it over the bytes that its eviction
  releases; both are scaled to 0 .. 1 over the candidates. A node with one child gives its states back, and its KV goes
  on with the child's.
* ``alpha`` is fixed, 1 by default. Marconi tunes it on its first requests after the first eviction; that is left out.

Nobody waits for another request's checkpoint, and none is protected for a request that waits.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.eviction import Eviction, Values
from hybridcache.prefix.points import Point
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.strategies.base import Strategy

POLICY = PrefixPolicy(placement=("branch_points", "generation_end"), retention="all", eviction="lru")


class RecencyAndEfficiency(Eviction):
    """Marconi's order; see the module. O(n) for each eviction, as Marconi's own."""

    name: ClassVar[str] = "marconi"

    def __init__(self, values: Values, alpha: float = 1.0) -> None:
        super().__init__(values)
        self.alpha = alpha
        self._efficiency: dict[Point, float] = {}

    def put(self, point: Point, now_s: float) -> None:
        point.slot = 0
        self._efficiency[point] = self.values.density(point)

    def remove(self, point: Point) -> None:
        point.slot = -1
        self._efficiency.pop(point, None)

    def victim(self, now_s: float) -> Point | None:
        points = [*self._efficiency]
        if not points:
            return None
        used = _scaled(np.array([point.touched_s for point in points]))
        utility = used + self.alpha * _scaled(np.array([*self._efficiency.values()]))
        ranked = np.argsort(utility, kind="stable")
        return next((points[i] for i in ranked if len(points[i].live_after()) <= 1), points[ranked[0]])


def _scaled(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros(len(values))


class MarconiPrefix(PrefixCache):
    """See the module."""

    def __init__(
        self, strategy: Strategy, alpha: float = 1.0, *, work: Callable[[int, int], float] | None = None
    ) -> None:
        super().__init__(strategy, POLICY, work=work)
        self._order = RecencyAndEfficiency(self.values, alpha)

    def holds_back(self, seq: Any) -> bool:
        return False

    def _protect(self, found: Point, prompt: Any) -> None:
        """Nobody's."""
