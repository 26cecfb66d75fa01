"""byte_exact: the lower bound. Every byte of a request is useful; no real allocator can hold less.

A request of ``L`` tokens holds ``S + t * L`` bytes of one budget. Nothing is placed, so it has no addresses and no
physical form.
"""

from collections.abc import Iterator
from typing import ClassVar

from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Held, Span, Strategy


class ByteExact(Strategy):
    """Counts bytes only."""

    name: ClassVar[str] = "byte_exact"
    has_addresses: ClassVar[bool] = False

    def __init__(self, spec: CacheSpec, budget_bytes: int, *, physical: bool = False) -> None:
        super().__init__(spec, budget_bytes, physical=physical)
        self._free = budget_bytes
        self._require_one_request(spec.request_bytes(1))

    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool:
        if self.spec.request_bytes(prompt_tokens) > self._free:
            return False
        self._free -= self.spec.request_bytes(num_tokens)
        return True

    def _grow(self, seq_id: int, num_tokens: int) -> bool:
        more = (num_tokens - self._tokens[seq_id]) * self.spec.kv_bytes_per_token
        if more > self._free:
            return False
        self._free -= more
        return True

    def _release(self, seq_id: int) -> None:
        self._free += self.spec.request_bytes(self._tokens[seq_id])

    def _held(self) -> Held:
        state = len(self._tokens) * self.spec.state_bytes
        return Held(state=state, kv=self.budget_bytes - self._free - state)

    def _reserved(self) -> int:
        return 0

    def _request_limit(self) -> int:
        return max(self.budget_bytes - self.spec.state_bytes, 0) // self.spec.kv_bytes_per_token

    def spans(self) -> Iterator[Span]:
        return iter(())

    def _check(self) -> None:
        assert self._free == self.budget_bytes - sum(map(self.spec.request_bytes, self._tokens.values()))
