"""Step: which tokens of which requests run together; Cohort: the requests of a step in which all decode."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hybridcache.engine.sequence import Sequence


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
    """Requests that decode one token each in every step, nobody else running: their progress as arrays.

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

    def advance(self) -> None:
        """Schedule one token more of each."""
        self.totals += 1
        self.pending = True

    def beyond_room(self) -> list[int]:
        """Places of those that need more memory for that."""
        return np.flatnonzero(self.totals > self.room).tolist()


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
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_decode(self) -> int:
        return sum(item.is_decode for item in self.items)

    def __bool__(self) -> bool:
        return self._items is None or bool(self._items)
