"""FutureUses: when each checkpoint of an open stream will be resumed from next, for the bound that knows the future."""

from bisect import bisect_right
from math import inf

import numpy as np

from hybridcache.prefix.index import Node, RadixIndex
from hybridcache.prefix.points import Point
from hybridcache.workloads.base import Workload


class FutureUses:
    """Looks up the arrivals of all requests whose prompt goes on behind a checkpoint. It holds every distinct token of the
    stream.

    Args:
        stream: its requests have token ids.
    """

    def __init__(self, stream: Workload) -> None:
        self._index = RadixIndex(history_tokens=1 << 40)
        for request in stream.requests:
            self._index.insert(np.asarray(request.prompt_ids, dtype=np.int32))
        self._through: dict[Node, list[float]] = {}
        """By the end of an edge: when requests arrive that have all its tokens; ``_beyond``: those that have more."""
        self._beyond: dict[Node, list[float]] = {}
        for request in stream.requests:  # in order of arrival
            last = self._index.walk(np.asarray(request.prompt_ids, dtype=np.int32)).node
            for node in last.path():
                self._through.setdefault(node, []).append(request.arrival_s)
                if node is not last:
                    self._beyond.setdefault(node, []).append(request.arrival_s)
        self._of: dict[Point, list[float]] = {}

    def after(self, point: Point, now_s: float) -> float:
        """The first arrival after a time; infinity where there is none."""
        times = self._of.get(point)
        if times is None:
            tokens = point.node.prefix()
            node, length, edge = self._index.walk(tokens)
            if length < len(tokens):
                times = []
            else:
                times = self._through[edge] if edge is not None else self._beyond.get(node, [])
            self._of[point] = times
        at = bisect_right(times, now_s)
        return times[at] if at < len(times) else inf
