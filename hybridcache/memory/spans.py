"""Spans and moves: what lies where in a pool, and what is to be copied."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """What a span of the pool holds; also the colour index of the pool map."""

    FREE = 0
    STATE = 1
    KV = 2
    RESERVED = 3


class Span(NamedTuple):
    """``num_bytes`` bytes from ``offset`` that one request holds. (A tuple: pool maps make tens of thousands of them.)"""

    offset: int
    num_bytes: int
    kind: Kind
    seq_id: int


@dataclass(frozen=True)
class Move:
    """A relocation that must happen before the tables are used again: copy ``num_bytes`` from ``src`` to ``dst``.

    Source and destination of one move never overlap; moves of one drain are executed in order.
    """

    src: int
    dst: int
    num_bytes: int
