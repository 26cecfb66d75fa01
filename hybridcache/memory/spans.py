"""Spans, moves and units: what lies where in a pool, and what is to be copied."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hybridcache.memory.free_list import listed_runs, merged_runs


class Kind(IntEnum):
    """What a span of the pool holds; also the colour index of the pool map."""

    FREE = 0
    STATE = 1
    KV = 2
    RESERVED = 3
    CACHED = 4


class Span(NamedTuple):
    """``num_bytes`` bytes from ``offset`` that somebody holds. (A tuple: pool maps make tens of thousands of them.)"""

    offset: int
    num_bytes: int
    kind: Kind
    seq_id: int
    """A resident that holds the bytes; the key of a cached owner where ``kind`` is ``CACHED``."""
    owners: int = 1
    """Residents and cached owners that hold them; whoever overwrites the bytes must be alone."""


@dataclass(frozen=True)
class Move:
    """A relocation that must happen before the tables are used again: copy ``num_bytes`` from ``src`` to ``dst``.

    Source and destination of one move never overlap; moves of one drain are executed in order.
    """

    src: int
    dst: int
    num_bytes: int


@dataclass(frozen=True)
class Units:
    """Equal pieces of a pool by number: unit ``i`` is the ``stride`` bytes from ``base + i * stride``, for every base."""

    bases: tuple[int, ...]
    stride: int

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of one unit."""
        return len(self.bases) * self.stride

    def extents(self, numbers: Iterable[int] | np.ndarray) -> np.ndarray:
        """``(offset, bytes)`` of these units in any order, neighbours merged: int64 ``[n, 2]``."""
        runs = merged_runs(numbers) * self.stride
        return np.concatenate([runs + np.array([base, 0]) for base in self.bases])

    def spans(self, numbers: Sequence[int], kind: Kind, seq_id: int, owners: int) -> Iterator[Span]:
        """As :meth:`extents`, as spans of one owner."""
        runs = listed_runs(numbers)
        for base in self.bases:
            for first, count in runs:
                yield Span(base + first * self.stride, count * self.stride, kind, seq_id, owners)
