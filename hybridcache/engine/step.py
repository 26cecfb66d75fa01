"""Step: the tokens of requests that run together. Cohort: requests that decode together, step after step.

A step has three forms: the scheduler makes a :class:`Step`, the runner packs it into host arrays (``StepFields``), and the
model reads those on the device as a ``StepBatch``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hybridcache.engine.sequence import Sequence


class Shape(NamedTuple):
    """Rows and tokens of a step, or of a graph that can hold it."""

    decode: int
    """Number of decoding rows, which have one token each."""
    tokens: int = 0
    """Number of tokens in prefilling rows."""
    prefill: int = 0
    """Number of prefilling rows; they stand behind those that decode."""

    @property
    def rows(self) -> int:
        return self.decode + self.prefill

    @property
    def total_tokens(self) -> int:
        return self.decode + self.tokens

    def holds(self, decode: int, tokens: int, prefill: int) -> bool:
        """Whether a step of that shape fits. A step without prefill fits only shapes without prefill."""
        if prefill == 0 or self.prefill == 0:
            return prefill == self.prefill and decode <= self.decode
        return decode <= self.decode and tokens <= self.tokens and prefill < self.prefill


class ScheduledTokens(NamedTuple):
    """Tokens ``start .. start + num_tokens - 1`` of one request. A tuple, since every step makes one per request."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether this is one token behind a cache that exists."""
        return self.num_tokens == 1 and self.start > 0

    @property
    def samples(self) -> bool:
        """Whether this computes the last known token, so that the step samples the next one."""
        return self.end == self.seq.num_known


class Cohort:
    """Requests that each decode one token in every step while nobody else runs: "the same step again" as one object.

    The scheduler makes a cohort, keeps its progress as arrays, and drops it as soon as a request joins, leaves, falls back or
    shares its states. Engine and runner keep here what they know of the step, so that all of it ends with the cohort.

    Args:
        seqs: all running requests in order; none of them prefills.
        room: tokens to which each can grow in the memory that it holds, by id.
    """

    def __init__(self, seqs: list[Sequence], room: Mapping[int, int]) -> None:
        self.seqs = seqs
        self.ids = [seq.seq_id for seq in seqs]
        self.totals = np.array([seq.num_computed for seq in seqs])
        """Computed tokens of each request once the last scheduled step has run."""
        self.room = np.array([room[seq_id] for seq_id in self.ids])
        self.steps_left = min(seq.max_tokens - seq.num_output for seq in seqs)
        """Steps until one of the requests has all its tokens."""
        self.pending = False
        """Whether a scheduled step has not been counted yet."""
        self.stopping: list[tuple[int, frozenset[int]]] | None = None
        """Places of the requests that a token can end, with those tokens; set by the engine."""
        self.packed: Any = None
        """The last step as the runner packed it, where it can be launched again one token further."""

    def advance(self) -> None:
        """Schedule one more token of each request."""
        self.totals += 1
        self.pending = True

    @property
    def free_steps(self) -> int:
        """How many more steps need no decision, if nobody joins: all requests go on, each in the memory that it holds."""
        return max(min(self.steps_left - 1, int((self.room - self.totals).min())), 0)

    def skip(self, steps: int) -> None:
        """Count so many further steps as run, their tokens as arrived (in simulation)."""
        self.totals += steps
        self.steps_left -= steps
        for seq in self.seqs:
            seq.num_computed += steps
            seq.num_output += steps
            seq.num_settled += steps


class Step:
    """One step: decodes first, then prefill chunks. The requests in ``preempted`` lost their memory to make it possible.

    ``cohort`` is set where the step repeats the last one, a token further for each request.
    """

    def __init__(
        self,
        items: list[ScheduledTokens] | None = None,
        preempted: list[Sequence] | None = None,
        cohort: Cohort | None = None,
    ) -> None:
        self.preempted = preempted or []
        self.cohort = cohort
        self.checkpoints: list[Any] = []
        """Checkpoints that this step makes (:class:`~hybridcache.prefix.planned.Planned`)."""
        self._items = items if items is not None or cohort is not None else []
        self._starts = None if cohort is None else cohort.totals - 1

    @property
    def items(self) -> list[ScheduledTokens]:
        """The scheduled tokens of each request, made on demand: a cohort is launched again without them."""
        if self._items is None:
            assert self.cohort is not None
            assert self._starts is not None
            starts = self._starts.tolist()
            self._items = [ScheduledTokens(seq, start, 1) for seq, start in zip(self.cohort.seqs, starts)]
        return self._items

    @property
    def seqs(self) -> list[Sequence]:
        """The requests, in the order of ``items``."""
        return self.cohort.seqs if self._items is None and self.cohort is not None else [i.seq for i in self.items]

    def only(self, items: list[ScheduledTokens]) -> "Step":
        """A step of only these items, with their checkpoints."""
        part, ids = Step(items), {item.seq.seq_id for item in items}
        part.checkpoints = [plan for plan in self.checkpoints if plan.request.seq_id in ids]
        return part

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_decode(self) -> int:
        return sum(item.is_decode for item in self.items)

    @property
    def shape(self) -> Shape:
        """Rows and tokens of the step, without padding."""
        decode = self.num_decode
        return Shape(decode, sum(item.num_tokens for item in self.items[decode:]), len(self.items) - decode)

    def __bool__(self) -> bool:
        return self._items is None or bool(self._items)
