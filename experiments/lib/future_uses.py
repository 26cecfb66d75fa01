"""FutureUses: when each checkpoint will be resumed from next, for the bound that knows the future."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

import numpy as np

from hybridcache.prefix.index import Node, RadixIndex
from hybridcache.prefix.points import Point
from hybridcache.workloads.base import Request, Stream

MOST_WAYS, MOST_LOOKED = 4, 32
"""Where so many ways go on behind a checkpoint, the next request is taken to use it; of more arrivals than that, the last."""


class FutureUses:
    """Looks up the arrivals of all requests whose prompt goes on behind a checkpoint. It holds every distinct token of the
    stream.

    Args:
        stream: its requests have token ids.
        service: seconds of a request, for a closed loop, whose arrivals follow from when others end; None for the recorded
            ones. Known is then what :func:`~hybridcache.sim.replay.replay` does where no request has to wait for memory.
    """

    def __init__(self, stream: Stream, service: Callable[[Request], float] | None = None) -> None:
        self._index = RadixIndex(history_tokens=1 << 40)
        for _, tokens in _arrivals(stream, service):
            self._index.insert(tokens)
        self._through: dict[Node, list[float]] = {}
        """By the end of an edge: when requests arrive that have all its tokens; ``_beyond``: those that have more."""
        self._beyond: dict[Node, list[float]] = {}
        for arrival_s, tokens in _arrivals(stream, service):
            last = self._index.walk(tokens).node
            for node in last.path():
                self._through.setdefault(node, []).append(arrival_s)
                if node is not last:
                    self._beyond.setdefault(node, []).append(arrival_s)
        self._of: dict[Point, list[float]] = {}

    def after(self, point: Point, now_s: float) -> float:
        """When the first request after a time arrives that will resume from the checkpoint: its prompt goes on behind it, and
        behind no later one that is alive. Infinity where there is none."""
        times = self._times(point)
        first = bisect_right(times, now_s)
        if first == len(times):
            return inf
        after = point.live_after()
        if len(after) > MOST_WAYS:
            return times[first]
        deeper = [self._times(later) for later in after]
        uses = (at for at in times[first : first + MOST_LOOKED] if not any(_holds(others, at) for others in deeper))
        return next(uses, times[first + MOST_LOOKED] if first + MOST_LOOKED < len(times) else inf)

    def _times(self, point: Point) -> list[float]:
        """Arrivals of all requests whose prompt goes on behind a checkpoint."""
        times = self._of.get(point)
        if times is None:
            tokens = point.node.prefix()
            node, length, edge = self._index.walk(tokens)
            if length < len(tokens):
                times = []
            else:
                times = self._through[edge] if edge is not None else self._beyond.get(node, [])
            self._of[point] = times
        return times


def _holds(times: list[float], one: float) -> bool:
    at = bisect_left(times, one)
    return at < len(times) and times[at] == one


def _arrivals(stream: Stream, service: Callable[[Request], float] | None) -> Iterator[tuple[float, np.ndarray]]:
    """Arrivals and prompts of a stream of which every request is served at once, in order."""
    stream, order = stream.fresh(), count()
    due: list[tuple[float, int, Request, bool]] = [(one.arrival_s, next(order), one, True) for one in stream.begin()]
    heapify(due)
    while due:
        now_s, _, request, arrives = heappop(due)
        if arrives:
            yield now_s, np.asarray(request.prompt_ids, dtype=np.int32)
            took = (request.service_s or 0.0) if service is None else service(request)
            heappush(due, (now_s + took, next(order), request, False))
        else:
            for released in stream.ended(request.request_id, now_s):
                heappush(due, (released.arrival_s, next(order), released, True))
