"""What strategies tell: usage, tables, and how they cut their pool."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hybridcache.memory.spans import Units


class Usage(NamedTuple):
    """Bytes of the budget by what they do. ``state_bytes + kv_bytes = held`` splits the same bytes by what they store.
    (A tuple: every step makes one.)"""

    budget: int
    useful: int
    padding: int
    reserved: int
    cached: int
    free: int
    state_bytes: int
    kv_bytes: int
    residents: int

    @property
    def held(self) -> int:
        """Bytes that residents hold."""
        return self.useful + self.padding

    @property
    def utilization(self) -> float:
        """Useful bytes over budget."""
        return self.useful / self.budget


@dataclass(frozen=True)
class Tables:
    """What kernels read: rows are requests, in the order asked for.

    ``kv`` is int32 ``[B, entries]``, padded with -1; ``state_read`` and ``state_write`` are int32 ``[B, state layers]``.
    """

    kv: np.ndarray
    state_read: np.ndarray
    state_write: np.ndarray


@dataclass(frozen=True)
class Cut:
    """How a strategy cuts its pool: units of states and units of KV."""

    state: Units
    states_per_request: int
    """Units that hold the states of all layers of one request."""
    kv: Units
    """A unit is one table entry."""
    entry_tokens: int
    """Tokens of one entry."""
    least_bytes: int
    """Pool that holds one request of one token."""
    kernel_tokens: int = 0
    """Tokens of a kernel block, the least that is copied; 0 for those of an entry."""
    entry_units: int = 1
    """Entries that the same tokens take (groups of attention layers with a table each)."""
