"""Metrics: how a run is observed and what a row of results holds. ``docs/metrics.md`` defines each of them.

A :class:`Recorder` watches one strategy on one workload, in simulation or real inference. Every step counts in the
time-weighted means; the time series keep a bounded number of slices of time, with the peaks inside each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hybridcache.observe.pool_map import pool_map
from hybridcache.observe.time_series import TimeSeries
from hybridcache.strategies.base import Strategy
from hybridcache.workloads.base import Request

if TYPE_CHECKING:
    from hybridcache.engine.sequence import Sequence

MAX_SAMPLES = 400
MAX_MAPS = 200
"""Columns of a pool map: a panel of the figure is some 500 pixels wide, and a map is dear."""

BYTES = ("useful_bytes", "padding_bytes", "reserved_bytes", "cached_bytes", "free_bytes", "state_bytes", "kv_bytes")
SAMPLED = (*BYTES, "running", "waiting")
PEAKS = ("held_bytes", "running", "waiting")
RECOMPUTED = ("recomputed_tokens_preemption", "recomputed_tokens_failure")
SUMMED = ("preemptions", *RECOMPUTED, "hit_tokens", "prompt_tokens", "output_tokens")
"""Columns that are sums over requests."""
LEAST_S = 1e-12
"""Duration of a step that took no time by its clock, so that a mean over such steps alone is their plain mean."""
SERVED = ("length", "stop")
"""``finish_reason`` of a request that got all its tokens."""


class EventSink(Protocol):
    """Anything that takes events: a file, a tracker, a list."""

    def write(self, event: dict[str, Any]) -> None: ...


class _Slice(NamedTuple):
    """What was observed in one slice of time."""

    time_s: float
    step: int
    """The first step in it."""
    duration_s: float
    sums: np.ndarray
    """Of :data:`SAMPLED`, times seconds."""
    peaks: np.ndarray
    """Most of each of :data:`PEAKS`."""

    def joined(self, later: _Slice) -> _Slice:
        duration_s, peaks = self.duration_s + later.duration_s, np.maximum(self.peaks, later.peaks)
        return _Slice(self.time_s, self.step, duration_s, self.sums + later.sums, peaks)


class Observation(NamedTuple):
    """What a step found when it began: the memory it runs in."""

    time_s: float
    step: int
    values: np.ndarray
    """Of :data:`SAMPLED`."""
    residents: int
    cells: dict[str, str]
    """The pool map; empty where none was wanted."""


class Recorder:
    """Observes one run of one strategy.

    A step's memory counts with the step's own duration. Where the duration is known at once, call :meth:`step`. Where steps
    overlap, call :meth:`observe` when a step is launched and :meth:`add` when it has ended: its duration is the time from its
    launch, or from the end of the step before it where that is later, to its own end. Both ends are seen in ``wait()``.

    Args:
        labels: written into every event and the result row (``phase``, ``strategy``, ``workload``, ``repetition``, ...).
        sink: takes the events at :meth:`finish`; None for none.
        origin_s: events count time from this moment of whatever clock drives the run (of an engine that has run before, its
            :meth:`now`).
    """

    def __init__(self, labels: dict[str, Any], sink: EventSink | None = None, origin_s: float = 0.0) -> None:
        self.labels = labels
        self.sink = sink
        self.origin_s = origin_s
        self.steps = 0
        self.residents_peak = 0
        self._observed = 0
        self._seconds = 0.0
        self._sums = np.zeros(len(SAMPLED))
        self._samples = TimeSeries(MAX_SAMPLES, _Slice.joined)
        self._maps: TimeSeries[Observation] = TimeSeries(MAX_MAPS, lambda first, later: first)

    def step(self, time_s: float, duration_s: float, strategy: Strategy, running: int, waiting: int) -> None:
        """Observe a step that began at ``time_s`` and lasted ``duration_s``, with the memory that it ran in."""
        self.add(self.observe(time_s, strategy, running, waiting), duration_s)

    def observe(self, time_s: float, strategy: Strategy, running: int, waiting: int) -> Observation:
        """Look at the memory in which a step that begins at ``time_s`` runs; it counts once :meth:`add` is called."""
        usage, time_s = strategy.usage(), time_s - self.origin_s
        self._observed += 1
        parts = (usage.useful, usage.padding, usage.reserved, usage.cached, usage.free)
        values = np.array([*parts, usage.state_bytes, usage.kv_bytes, running, waiting], dtype=np.float64)
        cells = pool_map(strategy) if strategy.has_addresses and self._maps.is_new(time_s) else {}
        return Observation(time_s, self._observed - 1, values, usage.residents, cells)

    def add(self, observed: Observation, duration_s: float) -> None:
        """Count a step, which lasted ``duration_s``. Steps are added in the order in which they began."""
        values, duration_s = observed.values, max(duration_s, LEAST_S)
        sums, peaks = values * duration_s, np.array([values[0] + values[1], values[-2], values[-1]])
        self.steps += 1
        self.residents_peak = max(self.residents_peak, observed.residents)
        self._seconds += duration_s
        self._sums += sums
        self._samples.add(_Slice(observed.time_s, observed.step, duration_s, sums, peaks))
        if observed.cells:
            self._maps.add(observed)

    def finish(
        self, sequences: Iterable[Sequence], strategy: Strategy, refused: Iterable[Request] = ()
    ) -> dict[str, Any]:
        """Write the events; return the result row (labels included).

        Args:
            sequences: the requests that were taken, all of them ended.
            refused: requests that the strategy could never hold and that were not taken.
        """
        done, refused = sorted(sequences, key=lambda seq: seq.seq_id), list(refused)
        first_id = min([seq.seq_id for seq in done] + [request.request_id for request in refused], default=0)
        requests = [self._request(seq, first_id) for seq in done]
        if self.sink is not None:
            for event in [*self._series(), *requests, *(self._refusal(request, first_id) for request in refused)]:
                self.sink.write({**event, **self.labels})
        means = self._sums / self._seconds if self._seconds else np.full(len(SAMPLED), math.nan)
        mean = dict(zip(SAMPLED, means.tolist()))
        sums = {name: sum(request[name] for request in requests) for name in SUMMED}
        finished = [seq.finish_s for seq in done if seq.finish_s is not None]
        duration_s = max(finished) - min(seq.arrival_s for seq in done) if finished else math.nan
        return {
            **self.labels, "budget_bytes": strategy.budget_bytes, "requests_offered": len(done) + len(refused),
            "requests_served": sum(seq.finish_reason in SERVED for seq in done), "requests_refused": len(refused),
            "steps": self.steps, "duration_s": duration_s, "residents_peak": self.residents_peak,
            "running_mean": mean["running"], "held_bytes_mean": mean["useful_bytes"] + mean["padding_bytes"],
            **{f"{name}_mean": mean[name] for name in ("useful_bytes", "reserved_bytes", "cached_bytes", "free_bytes")},
            "utilization_mean": mean["useful_bytes"] / strategy.budget_bytes, **sums,
            "output_tokens_per_s": sums["output_tokens"] / duration_s if duration_s > 0 else math.nan,
            **_percentiles("ttft", [seq.ttft_s for seq in done]),
            **_percentiles("tpot", [seq.tpot_s for seq in done]), "tokens_sha256": tokens_sha256(done),
            "bytes_moved": strategy.bytes_moved, "table_entries_appended": strategy.table_entries_appended,
        }  # fmt: skip

    def _series(self) -> Iterable[dict[str, Any]]:
        for at in self._samples.entries:
            means = dict(zip(SAMPLED, (at.sums / at.duration_s).tolist()))
            peaks = {f"{name}_max": value for name, value in zip(PEAKS, at.peaks.tolist())}
            when = {"step": at.step, "time_s": at.time_s, "duration_s": at.duration_s}
            yield {"event": "sample", **when, **means, **peaks}
        for moment in self._maps.entries:
            yield {"event": "pool_map", "step": moment.step, "time_s": moment.time_s, **moment.cells}

    def _request(self, seq: Sequence, first_id: int) -> dict[str, Any]:
        return {
            "event": "request", "seq_id": seq.seq_id - first_id, "arrival_s": seq.arrival_s - self.origin_s,
            "prompt_tokens": seq.prompt_len, "output_tokens": seq.num_output, "ttft_s": seq.ttft_s,
            "tpot_s": seq.tpot_s, "latency_s": None if seq.finish_s is None else seq.finish_s - seq.arrival_s,
            "preemptions": seq.num_preemptions, "recomputed_tokens_preemption": seq.recomputed_tokens,
            "recomputed_tokens_failure": seq.recomputed_after_failure, "hit_tokens": seq.hit_tokens,
            "finish_reason": seq.finish_reason,
        }  # fmt: skip

    def _refusal(self, request: Request, first_id: int) -> dict[str, Any]:
        return {
            "event": "refused",
            "seq_id": request.request_id - first_id,
            "arrival_s": request.arrival_s - self.origin_s,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
        }


def tokens_sha256(sequences: Iterable[Sequence]) -> str | None:
    """One hash over all sampled tokens in order of request id, counted from the first; None where nothing was sampled
    (simulation)."""
    digest, any_tokens = hashlib.sha256(), False
    ordered = sorted(sequences, key=lambda s: s.seq_id)
    for seq in ordered:
        any_tokens |= bool(seq.output_ids)
        head = [seq.seq_id - ordered[0].seq_id, len(seq.output_ids)]
        digest.update(np.array([*head, *seq.output_ids], dtype="<i8").tobytes())
    return digest.hexdigest() if any_tokens else None


def _percentiles(name: str, values: Iterable[float | None]) -> dict[str, float]:
    """p50, p90 and p99 of the values there are, interpolated linearly; NaN where there are none."""
    present = [value for value in values if value is not None]
    return {f"{name}_p{q}_s": float(np.percentile(present, q)) if present else math.nan for q in (50, 90, 99)}
