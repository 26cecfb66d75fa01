"""Step: which tokens of which requests run together. Cohort: the requests of a step in which all decode, again and again.

A step changes its form twice on its way: the scheduler makes a :class:`Step`, the runner packs it into host arrays
(``StepFields``), and the device reads those as a ``StepBatch``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hybridcache.engine.sequence import Sequence


class Shape(NamedTuple):
    """Rows and tokens of a step, or of a graph that holds one."""

    decode: int
    """Rows of one token each."""
    tokens: int = 0
    """Tokens of the prefilling rows."""
    prefill: int = 0
    """Prefilling rows; they stand behind those that decode."""

    @property
    def rows(self) -> int:
        return self.decode + self.prefill

    @property
    def total_tokens(self) -> int:
        return self.decode + self.tokens

    def holds(self, decode: int, tokens: int, prefill: int) -> bool:
        """Whether a step fits. One that prefills nothing takes only a graph for such steps."""
        if prefill == 0 or self.prefill == 0:
            return prefill == self.prefill and decode <= self.decode
        return decode <= self.decode and tokens <= self.tokens and prefill < self.prefill


class ScheduledTokens(NamedTuple):
    """Tokens ``start .. start + num_tokens - 1`` of one request. (A tuple: every step makes one for every request.)"""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """One token on top of a cache that exists."""
        return self.num_tokens == 1 and self.start > 0

    @property
    def samples(self) -> bool:
        """Whether this computes the last known token, so that the next one is sampled."""
        return self.end == self.seq.num_known


class Cohort:
    """Requests that decode one token each in every step, nobody else running: "the same step again" as one object.

    The scheduler makes it, keeps its progress as arrays, and drops it as soon as anybody joins, leaves, falls back or
    shares its states. What engine and runner find out about the step, they keep here too, so that nothing of it has a life
    of its own to be ended.

    Args:
        seqs: all running requests, none of which prefills, in order.
        room: to how many tokens each can grow in the memory that it holds.
    """

    def __init__(self, seqs: list[Sequence], room: Mapping[int, int]) -> None:
        self.seqs = seqs
        self.ids = [seq.seq_id for seq in seqs]
        self.totals = np.array([seq.num_computed for seq in seqs])
        """Tokens that each has computed once the step scheduled last has run."""
        self.room = np.array([room[seq_id] for seq_id in self.ids])
        self.steps_left = min(seq.max_tokens - seq.num_output for seq in seqs)
        """Until one of them has all its tokens."""
        self.pending = False
        """Whether a step is scheduled that has not been counted."""
        self.stopping: list[tuple[int, frozenset[int]]] | None = None
        """Places of the requests that a token can end, and which tokens; the engine's."""
        self.packed: Any = None
        """How the runner packed the step that it launched last, if it can launch it again one token further."""

    def advance(self) -> None:
        """Schedule one token more of each."""
        self.totals += 1
        self.pending = True


class Step:
    """One step: decodes first, then prefill chunks. ``preempted`` lost their memory to make it possible.

    ``cohort`` is set where the step is the last one again, a token further for each.
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
        """Checkpoints that this step makes (:class:`~hybridcache.prefix.checkpoints.Planned`)."""
        self._items = items if items is not None or cohort is not None else []
        self._starts = None if cohort is None else cohort.totals - 1

    @property
    def items(self) -> list[ScheduledTokens]:
        """Made when asked for: launching a cohort again takes none of them."""
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
        """A step of some of the items, with their checkpoints."""
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
        """Its rows and tokens, without padding."""
        decode = self.num_decode
        return Shape(decode, sum(item.num_tokens for item in self.items[decode:]), len(self.items) - decode)

    def __bool__(self) -> bool:
        return self._items is None or bool(self._items)
