"""Failures: keeps the steps that raised and finds the request to blame by computing suspects alone."""

import logging
import math

from hybridcache.engine.request import Request
from hybridcache.engine.sequence import Status
from hybridcache.engine.step import ScheduledTokens, Step
from hybridcache.errors import bad

_LOG = logging.getLogger(__name__)


class Failures:
    """The failures of one engine.

    States are updated in place, so after a step that raised every request in it has lost its memory. They are recomputed
    alone, to tell which one fails; one that keeps failing alone ends, and one that only ever fails in company stays alone.

    Args:
        max_retries: how often a request that failed alone is tried again, and how often moves of memory are.
    """

    def __init__(self, max_retries: int) -> None:
        if max_retries < 0:
            raise bad("max_retries", max_retries, "give 0 or more")
        self.max_retries = max_retries
        self.steps = 0
        """Batches that raised."""
        self.relocations = 0
        """Failed moves of memory in a row."""
        self.unjudged: list[tuple[list[ScheduledTokens], Exception]] = []
        """Batches that have failed since :meth:`judge`."""

    def add(self, items: list[ScheduledTokens], error: Exception) -> None:
        """Note a batch that raised."""
        self.unjudged.append((items, error))

    def forget(self) -> None:
        """Judge nobody for what has been added."""
        self.unjudged.clear()

    def groups(self, step: Step) -> list[Step]:
        """The step's items in batches: one for all, and one each for those under suspicion."""
        alone = [item for item in step.items if item.start < _request(item).alone_until]
        if not alone:
            return [step]
        together = [item for item in step.items if item not in alone]
        return ([step.only(together)] if together else []) + [step.only([item]) for item in alone]

    def judge(self) -> tuple[list[Request], list[Request]]:
        """Judge the batches that failed. Returns the requests to recompute, and those that end, with their error noted."""
        unjudged, self.unjudged = self.unjudged, []
        again: list[Request] = []
        ended: list[Request] = []
        for items, error in unjudged:
            self.steps += 1
            _LOG.warning("a step of %d request(s) failed; they are recomputed or end", len(items), exc_info=error)
            for item in items:
                request = _request(item)
                if request.status is Status.FINISHED or request in ended:
                    continue
                if len(items) == 1:
                    request.failures_alone += 1
                    request.alone_until = max(request.alone_until, item.end)
                else:
                    request.failures_together += 1
                    # One that fails in company time and again, yet never alone, stays alone.
                    request.alone_until = item.end if request.failures_together <= self.max_retries else math.inf
                if request.failures_alone > self.max_retries:
                    request.error = f"{type(error).__name__}: {error}"
                    ended.append(request)
                else:
                    again.append(request)
        return again, ended

    def not_moved(self, error: Exception) -> None:
        """Note moves that raised: the caller recomputes all requests. Re-raises the error after too many in a row."""
        self.relocations += 1
        if self.relocations > self.max_retries:
            raise error
        _LOG.warning("moving memory failed; all running requests are recomputed", exc_info=error)


def _request(item: ScheduledTokens) -> Request:
    assert isinstance(item.seq, Request)
    return item.seq
