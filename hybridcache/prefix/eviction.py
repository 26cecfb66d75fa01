"""Eviction: which checkpoint goes when blocks are short.

Evicting a checkpoint releases its states, and the KV that no other checkpoint and no running request needs: KV beyond the last
checkpoint of a path is never kept, so none outlives the other. Orders that do not change with time keep a heap (O(log n) a
change); one that does looks at a bounded sample.

=================  ===================================================================================================
``lru``            used longest ago. Only the checkpoint that a request resumes from is refreshed, not those before it.
``lru_path``       used longest ago, where a use refreshes all checkpoints on its path.
``flop_aware``     least FLOPs saved per byte really released, with recency (GreedyDual-Size, Cao and Irani 1997; Marconi,
                   MLSys 2025, weighs the same two).
``segment_aware``  used longest ago, each token that would be computed again counting as recency.
``reuse_density``  least expected saving per byte and second, by learnt times of reuse (:mod:`hybridcache.prefix.reuse`).
``farthest``       next use farthest in the future: a bound, for streams whose future is known (Belady 1966).
=================  ===================================================================================================
"""

import heapq
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from hybridcache.errors import bad
from hybridcache.prefix.points import Point, Standing
from hybridcache.prefix.reuse import ReuseTimes, class_of

NextUse = Callable[[Point], float]
"""Time of the next request that will resume from a checkpoint; infinity where none will."""
SAMPLE = 64
FALLBACK = 0.1
"""Share of reuses taken to find the latest checkpoint evicted and an earlier one alive."""


class Values:
    """What keeping a checkpoint saves, and what evicting it releases.

    Args:
        work: FLOPs (or any measure) of computing tokens ``a .. b - 1`` of a sequence.
        released: bytes that evicting the checkpoint of a key would free now.
    """

    def __init__(self, work: Callable[[int, int], float], released: Callable[[int], int]) -> None:
        self.work = work
        self.released = released

    def saved(self, point: Point) -> float:
        """Work that a request resuming from it is spared, beyond what the checkpoint before it spares."""
        before = point.live_before()
        return self.work(0 if before is None else before.position, point.position)

    def density(self, point: Point) -> float:
        """Work saved per byte released."""
        return self.saved(point) / max(self.released(point.key), 1)


class Eviction(ABC):
    """An order of all live checkpoints. Subclasses are named in :data:`ORDERS`."""

    name: ClassVar[str]

    def __init__(self, values: Values, *, next_use: NextUse | None = None, seed: int = 0) -> None:
        self.values = values

    @abstractmethod
    def put(self, point: Point, now_s: float) -> None:
        """A checkpoint was made or resumed from just now, or what it saves or releases has changed."""

    @abstractmethod
    def remove(self, point: Point) -> None:
        """A checkpoint is none, or not to be evicted for now."""

    @abstractmethod
    def victim(self, now_s: float) -> Point | None:
        """The checkpoint to evict; None where there is none."""

    def begun(self, point: Point) -> None:
        """A wait for the next reuse begins."""

    def reused(self, point: Point, now_s: float) -> None:
        """A request came that resumes from the checkpoint, or would if it were alive."""

    def stands(self, point: Point, standing: Standing) -> None:
        """The checkpoint's sequence has gone on."""
        point.standing = standing


class _Ordered(Eviction):
    """Orders by a number that stays until the checkpoint is put again."""

    def __init__(self, values: Values, *, next_use: NextUse | None = None, seed: int = 0) -> None:
        super().__init__(values, next_use=next_use, seed=seed)
        self._heap: list[tuple[float, int, int, Point]] = []
        self._count = 0
        self._put = 0

    @abstractmethod
    def priority(self, point: Point, now_s: float) -> float:
        """Lowest goes first."""

    def put(self, point: Point, now_s: float) -> None:
        self._count += point.slot < 0
        point.slot, point.serial = 0, point.serial + 1
        self._put += 1
        heapq.heappush(self._heap, (self.priority(point, now_s), self._put, point.serial, point))
        if len(self._heap) > 64 + 4 * self._count:
            self._heap = [entry for entry in self._heap if _valid(entry)]
            heapq.heapify(self._heap)

    def remove(self, point: Point) -> None:
        self._count -= point.slot >= 0
        point.slot = -1

    def victim(self, now_s: float) -> Point | None:
        while self._heap and not _valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None


def _valid(entry: tuple[float, int, int, Point]) -> bool:
    point = entry[3]
    return point.slot >= 0 and point.serial == entry[2]


class Lru(_Ordered):
    """Used longest ago."""

    name = "lru"

    def priority(self, point: Point, now_s: float) -> float:
        return point.touched_s


class LruPath(Lru):
    """Used longest ago; a use counts for all checkpoints before it, too."""

    name = "lru_path"

    def put(self, point: Point, now_s: float) -> None:
        super().put(point, now_s)
        if point.touched_s < now_s or not point.live:
            return
        for node in point.node.path():
            other = node.point
            if other is not None and other.slot >= 0 and other.touched_s < now_s:
                other.touched_s = now_s
                super().put(other, now_s)


class SegmentAware(_Ordered):
    """Used longest ago, with a credit in seconds for every token that would be computed again.

    Args:
        seconds_per_token: the credit.
    """

    name = "segment_aware"

    def __init__(
        self, values: Values, *, next_use: NextUse | None = None, seed: int = 0, seconds_per_token: float = 0.01
    ) -> None:
        super().__init__(values)
        self.seconds_per_token = seconds_per_token

    def priority(self, point: Point, now_s: float) -> float:
        before = point.live_before()
        segment = point.position - (0 if before is None else before.position)
        return point.touched_s + self.seconds_per_token * segment


class FlopAware(_Ordered):
    """GreedyDual-Size: a checkpoint's priority is that of the last victim at its last use, and its density."""

    name = "flop_aware"

    def __init__(self, values: Values, *, next_use: NextUse | None = None, seed: int = 0) -> None:
        super().__init__(values)
        self._clock = 0.0
        self._touched: dict[Point, float] = {}

    def priority(self, point: Point, now_s: float) -> float:
        if self._touched.get(point) != point.touched_s:  # otherwise only its density has changed
            self._touched[point], point.credit = point.touched_s, self._clock
        return point.credit + self.values.density(point)

    def remove(self, point: Point) -> None:
        super().remove(point)
        if not point.live:
            self._touched.pop(point, None)

    def victim(self, now_s: float) -> Point | None:
        found = super().victim(now_s)
        if found is not None:
            self._clock = max(self._clock, self._heap[0][0])
        return found


class Farthest(_Ordered):
    """Next use farthest in the future; without ``next_use``, the one that :meth:`PrefixCache.foretell` was told."""

    name = "farthest"

    def __init__(self, values: Values, *, next_use: NextUse | None = None, seed: int = 0) -> None:
        super().__init__(values)
        self.next_use: NextUse = next_use or (lambda point: point.next_use_s)
        self._due: list[tuple[float, int, int, Point]] | None = None if next_use is None else []
        """By the next use, which is another one as soon as its time is past."""

    def priority(self, point: Point, now_s: float) -> float:
        return -self.next_use(point)

    def put(self, point: Point, now_s: float) -> None:
        super().put(point, now_s)
        if self._due is not None:
            heapq.heappush(self._due, (self.next_use(point), self._put, point.serial, point))

    def victim(self, now_s: float) -> Point | None:
        while self._due and self._due[0][0] <= now_s:
            passed = heapq.heappop(self._due)
            if _valid(passed):
                self.put(passed[3], now_s)
        return super().victim(now_s)


class ReuseDensity(Eviction):
    """Least expected saving per byte and second, among a random sample of :data:`SAMPLE` (all, where there are fewer)."""

    name = "reuse_density"

    def __init__(self, values: Values, *, next_use: NextUse | None = None, seed: int = 0) -> None:
        super().__init__(values)
        self.times = ReuseTimes()
        self._points: list[Point] = []
        self._random = random.Random(seed)

    def put(self, point: Point, now_s: float) -> None:
        point.credit = self.values.density(point)
        if point.slot < 0:
            point.slot = len(self._points)
            self._points.append(point)

    def remove(self, point: Point) -> None:
        if point.slot >= 0:
            last = self._points.pop()
            if last is not point:
                self._points[point.slot] = last
                last.slot = point.slot
            point.slot = -1

    def worth(self, point: Point, now_s: float) -> float:
        """Work saved per byte and second of keeping it. A superseded checkpoint is also what its sequence falls back on if the
        later one has been evicted by the time of its reuse."""
        rate = self.times.rate(point, now_s)
        if point.standing is Standing.SUPERSEDED:
            rate += FALLBACK * max((self.times.rate(other, now_s) for other in point.live_after()), default=0.0)
        return rate * point.credit

    def victim(self, now_s: float) -> Point | None:
        points = self._points
        some = points if len(points) <= SAMPLE else self._random.sample(points, SAMPLE)
        return min(some, key=lambda point: self.worth(point, now_s), default=None)

    def begun(self, point: Point) -> None:
        self.times.begun(point)

    def reused(self, point: Point, now_s: float) -> None:
        self.times.reused(point, now_s)

    def stands(self, point: Point, standing: Standing) -> None:
        if point.standing is not standing:
            before = class_of(point)
            point.standing = standing
            self.times.moved(before, point)


ORDERS: dict[str, type[Eviction]] = {
    kind.name: kind for kind in (Lru, LruPath, FlopAware, SegmentAware, ReuseDensity, Farthest)
}
"""Eviction orders by name."""


def make_eviction(name: str, values: Values, *, next_use: NextUse | None = None, seed: int = 0) -> Eviction:
    """An eviction order by its name.

    Raises:
        UserError: an unknown name.
    """
    if name not in ORDERS:
        raise bad("eviction", name, f"choose one of {', '.join(ORDERS)}")
    return ORDERS[name](values, next_use=next_use, seed=seed)
