"""Metrics: how a run is observed and what a row of results holds. ``docs/metrics.md`` defines each of them.

A :class:`Recorder` watches one strategy on one workload, in simulation or real inference. It accumulates time-weighted
means of every step and keeps a bounded number of samples and pool maps for the time series.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from hybridcache.engine.sequence import Sequence
from hybridcache.strategies.base import Kind, Strategy, Usage

MAX_SAMPLES = 400
MAX_MAPS = 96
MAP_CELLS = 160


class EventSink(Protocol):
    """Anything that takes events: a file, a tracker, a list."""

    def write(self, event: dict[str, Any]) -> None: ...


def pool_map(strategy: Strategy, cells: int = MAP_CELLS) -> str:
    """The budget cut into ``cells`` equal slices in address order: one digit each, the :class:`Kind` with most bytes."""
    edges = np.linspace(0, strategy.budget_bytes, cells + 1)
    covered = np.zeros((len(Kind), cells))
    for kind, extents in strategy.extents().items():
        if len(extents):
            starts, lengths = extents[np.argsort(extents[:, 0])].T
            total = np.cumsum(lengths)
            x = np.stack([starts, starts + lengths], axis=1).ravel()
            y = np.stack([total - lengths, total], axis=1).ravel()
            covered[kind] = np.diff(np.interp(edges, x, y))
    covered[Kind.FREE] = np.diff(edges) - covered.sum(axis=0)
    return "".join(str(kind) for kind in covered.argmax(axis=0))


class _Thinned:
    """A time series of bounded length: when full, every other entry goes and the stride doubles."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.stride = 1
        self.entries: list[dict[str, Any]] = []

    def wants(self, step: int) -> bool:
        return step % self.stride == 0

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if len(self.entries) > self.limit:
            self.entries = self.entries[::2]
            self.stride *= 2


class Recorder:
    """Observes one run of one strategy.

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
        self._weights = 0.0
        self._sums = dict.fromkeys(("useful", "held", "reserved", "free", "utilization"), 0.0)
        self._samples = _Thinned(MAX_SAMPLES)
        self._maps = _Thinned(MAX_MAPS)

    def step(self, time_s: float, duration_s: float, strategy: Strategy, running: int, waiting: int) -> None:
        """Observe one step that began at ``time_s`` and lasted ``duration_s``, with the memory it ran in."""
        usage = strategy.usage()
        self.residents_peak = max(self.residents_peak, usage.residents)
        self._weights += duration_s
        for name in self._sums:
            self._sums[name] += getattr(usage, name) * duration_s
        if self._samples.wants(self.steps):
            self._samples.add({**self._moment(time_s), **_usage_fields(usage), "running": running, "waiting": waiting})
        if self._maps.wants(self.steps) and strategy.has_addresses:
            self._maps.add({**self._moment(time_s), "cells": pool_map(strategy)})
        self.steps += 1

    def _moment(self, time_s: float) -> dict[str, Any]:
        return {"step": self.steps, "time_s": time_s - self.origin_s}

    def _mean(self, name: str) -> float:
        return self._sums[name] / self._weights if self._weights else math.nan

    def finish(self, sequences: Iterable[Sequence], duration_s: float, strategy: Strategy) -> dict[str, Any]:
        """Write the events; return the result row (labels included)."""
        done = sorted(sequences, key=lambda seq: seq.seq_id)
        if self.sink is not None:
            for name, series in (("sample", self._samples), ("pool_map", self._maps)):
                for entry in series.entries:
                    self.sink.write({"event": name, **self.labels, **entry})
            for seq in done:
                self.sink.write({"event": "request", **self.labels, **_request_fields(seq, self.origin_s)})
        output_tokens = sum(seq.num_output for seq in done)
        return {
            **self.labels,
            "budget_bytes": strategy.budget_bytes,
            "requests": len(done),
            "steps": self.steps,
            "duration_s": duration_s,
            "residents_peak": self.residents_peak,
            "useful_bytes_mean": self._mean("useful"),
            "held_bytes_mean": self._mean("held"),
            "reserved_bytes_mean": self._mean("reserved"),
            "free_bytes_mean": self._mean("free"),
            "utilization_mean": self._mean("utilization"),
            "preemptions": sum(seq.num_preemptions for seq in done),
            "recomputed_tokens": sum(seq.recomputed_tokens for seq in done),
            "prompt_tokens": sum(seq.prompt_len for seq in done),
            "output_tokens": output_tokens,
            "output_tokens_per_s": output_tokens / duration_s if duration_s > 0 else math.nan,
            "ttft_p50_s": _percentile([seq.ttft_s for seq in done], 50),
            "ttft_p99_s": _percentile([seq.ttft_s for seq in done], 99),
            "tpot_p50_s": _percentile([seq.tpot_s for seq in done], 50),
            "tokens_sha256": tokens_sha256(done),
            "bytes_moved": strategy.bytes_moved,
            "table_entries_appended": strategy.table_entries_appended,
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


def _percentile(values: Iterable[float | None], q: float) -> float:
    present = [value for value in values if value is not None]
    return float(np.percentile(present, q)) if present else math.nan


def _usage_fields(usage: Usage) -> dict[str, int]:
    return {
        "useful_bytes": usage.useful,
        "padding_bytes": usage.padding,
        "reserved_bytes": usage.reserved,
        "free_bytes": usage.free,
        "state_bytes": usage.state_bytes,
        "kv_bytes": usage.kv_bytes,
    }


def _request_fields(seq: Sequence, origin_s: float) -> dict[str, Any]:
    latency = None if seq.finish_s is None else seq.finish_s - seq.arrival_s
    return {
        "seq_id": seq.seq_id,
        "arrival_s": seq.arrival_s - origin_s,
        "prompt_tokens": seq.prompt_len,
        "output_tokens": seq.num_output,
        "ttft_s": seq.ttft_s,
        "tpot_s": seq.tpot_s,
        "latency_s": latency,
        "preemptions": seq.num_preemptions,
        "recomputed_tokens": seq.recomputed_tokens,
        "finish_reason": seq.finish_reason,
    }
