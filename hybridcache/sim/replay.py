"""replay: a stream through a strategy and its prefix cache, a request at a time, with the recorded service times.

Where the question is what a cache keeps, and not how fast a device is, steps need not be simulated: a request computes its
prompt at once, holds the memory of its whole prompt and output for as long as the recorded system took, and leaves what its
policy keeps. It is a hundred times as fast as :func:`~hybridcache.sim.simulator.simulate`, and no policy changes the times at
which the others ask, so that policies are compared on the same accesses.
"""

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from hybridcache.engine.sequence import Status
from hybridcache.engine.step import ScheduledTokens
from hybridcache.prefix.cache import PrefixCache
from hybridcache.sim.simulator import SimulatedSequence
from hybridcache.strategies.base import Strategy
from hybridcache.workloads.base import Request, Stream, UniqueIds


@dataclass(frozen=True)
class Replayed:
    """What a replay did; bytes are means over time."""

    requests: int
    refused: int
    prompt_tokens: int
    hit_tokens: int
    computed_tokens: int
    duration_s: float
    live_bytes: float
    cached_bytes: float
    host_bytes: float
    host_hit_tokens: int
    evicted: int

    @property
    def hit_rate(self) -> float:
        """Tokens found, over all input tokens."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else math.nan


class Replay:
    """One run; see the module.

    Args:
        stream: gives token ids, and ``service_s`` unless ``service`` does.
        strategy: empty; it holds live requests and checkpoints alike.
        prefix: over that strategy.
        service: seconds of a request that found so many tokens; None for the recorded ones.
    """

    def __init__(self, stream: Stream, strategy: Strategy, prefix: PrefixCache, service=None) -> None:
        self.stream, self.strategy, self.prefix, self._service = stream.fresh(), strategy, prefix, service
        self._limit = strategy.request_limit()
        self._events: list[tuple[float, int, Request | None, SimulatedSequence | None]] = []
        self._order = count()
        self._waiting: deque[SimulatedSequence] = deque()
        self._unique = UniqueIds()
        self._running = 0
        self._now = self._seconds = 0.0
        self._means = [0.0, 0.0, 0.0]
        self._sums = {"requests": 0, "refused": 0, "prompt_tokens": 0, "hit_tokens": 0, "host_hit_tokens": 0}

    def run(self) -> Replayed:
        """Run the stream to its end."""
        for begun in self.stream.begin():
            self._push(begun.arrival_s, begun, None)
        first = self._events[0][0] if self._events else 0.0
        self._now = first
        while self._events:
            time_s, _, request, seq = heappop(self._events)
            self._pass(time_s)
            if request is not None:
                self._arrive(request)
            elif seq is not None:
                self._end(seq)
            self._admit_waiting()
        sums, seconds = self._sums, self._seconds or 1.0
        live, cached, host = (value / seconds for value in self._means)
        return Replayed(
            **sums, computed_tokens=sums["prompt_tokens"] - sums["hit_tokens"], duration_s=self._now - first,
            live_bytes=live, cached_bytes=cached, host_bytes=host, evicted=self.prefix.evicted,
        )  # fmt: skip

    def _push(self, time_s: float, request: Request | None, seq: SimulatedSequence | None) -> None:
        heappush(self._events, (time_s, next(self._order), request, seq))

    def _pass(self, time_s: float) -> None:
        """Let time pass; what was held counts for as long as it was."""
        passed = time_s - self._now
        if passed > 0:
            usage = self.strategy.usage()
            for at, value in enumerate((usage.held, usage.cached, self.prefix.host_bytes)):
                self._means[at] += value * passed
            self._seconds += passed
            self._now = self.prefix.now_s = time_s

    def _arrive(self, request: Request) -> None:
        seq = SimulatedSequence(
            request.request_id, request.prompt_tokens, request.output_tokens, request.arrival_s,
            request=request, unique=self._unique,
        )  # fmt: skip
        if seq.max_stored_tokens > self._limit:
            self._sums["refused"] += 1
            for released in self.stream.ended(request.request_id, self._now, aborted=True):
                self._push(released.arrival_s, released, None)
            return
        self.prefix.submitted(seq)
        self._waiting.append(seq)

    def _admit_waiting(self) -> None:
        at = 0
        while at < len(self._waiting):
            seq = self._waiting[at]
            if self.prefix.holds_back(seq):
                at += 1
                continue
            if not self._admit(seq):
                break
            del self._waiting[at]
        if self._waiting and not self._running and not self._events:
            raise RuntimeError(f"{self.strategy.name}: no request can be admitted ({self.strategy.usage()})")

    def _admit(self, seq: SimulatedSequence) -> bool:
        before, found = self.prefix.host_hit_tokens, self.prefix.find(seq)
        start = 0 if found is None else found.position
        end = start + (self.prefix.cut(seq, start, seq.prompt_len - start) or seq.prompt_len - start)
        admitted = self.prefix.admit(
            seq, found, end, seq.max_stored_tokens if seq.max_tokens > 1 else None, urgent=not self._running
        )
        if not admitted and found is not None and not self._running:
            self.prefix.make_room(urgent=True, idle=True)
            return self._admit(seq)
        if not admitted:
            return False
        self.prefix.admitted(seq, found, first=True)
        seq.hit_tokens, seq.status = start, Status.RUNNING
        at = start
        while True:
            self.strategy.settle_states([seq.seq_id])
            if at < seq.prompt_len:
                self.prefix.keep(self.prefix.plan([ScheduledTokens(seq, at, end - at)]))
            if (at := end) >= seq.max_stored_tokens:
                break
            rest = (seq.prompt_len if at < seq.prompt_len else seq.max_stored_tokens) - at
            end = at + (self.prefix.cut(seq, at, rest) or rest)
            while not self.strategy.grow(seq.seq_id, end):
                if not self.prefix.make_room(urgent=True):
                    raise RuntimeError(f"{self.strategy.name}: no room for an output ({self.strategy.usage()})")
        self.strategy.settle_states([seq.seq_id])
        self._sums["requests"] += 1
        self._sums["prompt_tokens"] += seq.prompt_len
        self._sums["hit_tokens"] += start
        self._sums["host_hit_tokens"] += self.prefix.host_hit_tokens - before
        self._running += 1
        assert seq.request is not None
        took = seq.request.service_s if self._service is None else self._service(seq)
        self._push(self._now + (took or 0.0), None, seq)
        return True

    def _end(self, seq: SimulatedSequence) -> None:
        seq.num_output = seq.num_settled = seq.max_tokens
        seq.num_computed = seq.max_stored_tokens
        self.prefix.ending(seq)
        self.strategy.release(seq.seq_id)
        self.prefix.ended(seq)
        self._running -= 1
        next_s = math.inf
        for released in self.stream.ended(seq.seq_id, self._now):
            self._push(released.arrival_s, released, None)
            if seq.request is not None and released.session == seq.request.session:
                next_s = min(next_s, released.arrival_s)
        self.prefix.foretell(seq, next_s)
        seq.request = seq.ids = None


def replay(stream: Stream, strategy: Strategy, prefix: PrefixCache, service=None) -> Replayed:
    """Run a stream to its end; see the module.

    Raises:
        UserError: the stream gives no token ids or no service times.
    """
    return Replay(stream, strategy, prefix, service).run()
