"""byte_exact: the lower bound. Every byte of a request is useful; no real allocator can hold less.

A request of ``L`` tokens holds ``S + t * L`` bytes of one budget. Nothing is placed, so it has no addresses and no
physical form: units are counted, not numbered.
"""

from array import array
from collections.abc import MutableSequence, Sequence
from typing import Any, ClassVar

from hybridcache.memory.spans import Units
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Cut, Strategy

ONE = array("i", [0])


class ByteExact(Strategy):
    """Counts bytes only."""

    name: ClassVar[str] = "byte_exact"
    has_addresses: ClassVar[bool] = False

    def __init__(self, spec: CacheSpec, budget_bytes: int, **common: Any) -> None:
        super().__init__(spec, budget_bytes, **common)
        self._set_up()

    def _cut(self, pool_bytes: int) -> Cut:
        self._free = pool_bytes
        return Cut(
            state=Units((0,), self.spec.state_bytes), states_per_request=1,
            kv=Units((0,), self.spec.kv_bytes_per_token), entry_tokens=1, least_bytes=self.spec.request_bytes(1),
        )  # fmt: skip

    @property
    def table_bytes(self) -> int:
        """None: a bound needs no tables to find its bytes."""
        return 0

    def _fits(self, entries: int, states: bool) -> bool:
        return entries * self.spec.kv_bytes_per_token + states * self.spec.state_bytes <= self._free

    def _take_states(self) -> MutableSequence[int]:
        self._free -= self.spec.state_bytes
        return [0]

    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        self._free -= entries * self.spec.kv_bytes_per_token
        return ONE if entries == 1 else array("i", bytes(4 * entries))

    def _give_states(self, units: Sequence[int]) -> None:
        self._free += len(units) * self.spec.state_bytes

    def _give_kv(self, units: Sequence[int]) -> None:
        self._free += len(units) * self.spec.kv_bytes_per_token

    def _free_bytes(self) -> int:
        return self._free

    def _reserved(self) -> int:
        return self.budget_bytes - self.pool_bytes

    def _request_limit(self) -> int:
        return max(self.pool_bytes - self.spec.state_bytes, 0) // self.spec.kv_bytes_per_token
