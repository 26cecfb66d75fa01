"""Time series of bounded length: one entry per slice of time, whatever the number of steps."""

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

LEAST_WIDTH_S = 1e-12


class Timed(Protocol):
    """Anything that has a time."""

    @property
    def time_s(self) -> float: ...


Entry = TypeVar("Entry", bound=Timed)


class TimeSeries(Generic[Entry]):
    """One entry per slice of time. Slices start as single steps and get twice as wide when there are more than ``limit``."""

    def __init__(self, limit: int, join: Callable[[Entry, Entry], Entry]) -> None:
        self.limit, self.join = limit, join
        self.width_s = 0.0
        self.entries: list[Entry] = []

    def is_new(self, time_s: float) -> bool:
        """Whether no entry lies in the slice of this time, which is not before the last entry's."""
        return not self.entries or not self.width_s or self._slice(time_s) != self._slice(self.entries[-1].time_s)

    def _slice(self, time_s: float) -> int:
        return math.floor((time_s - self.entries[0].time_s) / self.width_s)

    def add(self, entry: Entry) -> None:
        if self.is_new(entry.time_s):
            self.entries.append(entry)
        else:
            self.entries[-1] = self.join(self.entries[-1], entry)
        if len(self.entries) > self.limit:
            span = self.entries[-1].time_s - self.entries[0].time_s
            self.width_s = max(2 * self.width_s, 2 * span / self.limit, LEAST_WIDTH_S)
            entries, self.entries = self.entries, []
            for old in entries:
                self.add(old)
