"""lcm_carve: a large page is bound to one type while it is used. Jenga's allocator, and TokenSpeed's order of filling.

A strict least common multiple of a KV page and a state is hundreds of MiB for Qwen3-Next, so the usable form takes a
ceiling: a large page is one request's whole state (all layers) rounded up to ``K`` KV pages of ``page_size`` tokens. While any
of its children is used it holds either one state or up to ``K`` KV pages, which several requests may share. Nothing is ever
relocated. Where the next KV pages come from, without prefix caching:

* ``fullest`` (TokenSpeed): the fullest large page with a free child, then an empty large page.
* ``jenga``: a large page that this request already uses, then an empty large page, then any other one.
"""

from array import array
from collections.abc import MutableSequence, Sequence
from typing import Any, ClassVar

from hybridcache.errors import bad, whole
from hybridcache.memory.free_list import FreeList
from hybridcache.memory.spans import Units
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Cut, Strategy
from hybridcache.strategies.options import whole_or_none
from hybridcache.strategies.parents import Parents

ORDERS = ("fullest", "jenga")


class LcmCarve(Strategy):
    """Large pages of one state or ``K`` KV pages. Accounting with addresses; not physical.

    Args:
        order: ``fullest`` or ``jenga``.
        page_size: tokens of a KV page.
        placement_seed: shuffle the empty large pages first (tests).
    """

    name: ClassVar[str] = "lcm_carve"

    def __init__(
        self, spec: CacheSpec, budget_bytes: int, *, order: str = "fullest", page_size: int = 64,
        placement_seed: int | None = None, **common: Any,
    ) -> None:  # fmt: skip
        super().__init__(spec, budget_bytes, **common)
        if order not in ORDERS:
            raise bad("order", order, f"choose one of {', '.join(ORDERS)}")
        self.order = order
        self.page_size = whole("page_size", page_size)
        self.page_bytes = page_size * spec.kv_bytes_per_token
        self.children = -(-spec.state_bytes // self.page_bytes)
        """``K``: KV pages of one large page."""
        self.large_page_bytes = self.children * self.page_bytes
        self._placement_seed = whole_or_none("placement_seed", placement_seed, 0)
        self._set_up()

    def _cut(self, pool_bytes: int) -> Cut:
        self.num_large_pages = pool_bytes // self.large_page_bytes
        self._free = FreeList(self.num_large_pages, placement_seed=self._placement_seed)
        self._parents = Parents(self.children)
        return Cut(
            state=Units((0,), self.large_page_bytes), states_per_request=1, kv=Units((0,), self.page_bytes),
            entry_tokens=self.page_size, least_bytes=2 * self.large_page_bytes,
        )  # fmt: skip

    def _fits(self, entries: int, states: bool) -> bool:
        empty = len(self._free) - states
        return empty >= 0 and entries <= empty * self.children + self._parents.free_children

    def _take_states(self) -> MutableSequence[int]:
        return self._free.take(1)

    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        used = dict.fromkeys(page // self.children for page in held) if self.order == "jenga" else {}
        taken: list[int] = []
        while (missing := entries - len(taken)) > 0:
            parent = self._next(used)
            if parent is None:
                parent = self._free.pop()
                taken += self._parents.open(parent, min(missing, self.children))
            else:
                taken += self._parents.take(parent, missing)
            used[parent] = None
        return taken

    def _next(self, used: dict[int, None]) -> int | None:
        """The large page to take children of, given those that the request uses; None for an empty one."""
        if self.order == "fullest":
            return self._parents.fullest()
        own = self._parents.among(used)
        return own if own is not None or len(self._free) else self._parents.fullest()

    def _give_states(self, units: Sequence[int]) -> None:
        self._free.put_all(units)

    def _give_kv(self, units: Sequence[int]) -> None:
        self._parents.give(units, self._free)

    def _free_bytes(self) -> int:
        return len(self._free) * self.large_page_bytes + self._parents.free_children * self.page_bytes

    def _reserved(self) -> int:
        return self.budget_bytes - self.num_large_pages * self.large_page_bytes

    def _request_limit(self) -> int:
        return max(self.num_large_pages - 1, 0) * self.children * self.page_size

    def _check(self, states: Sequence[int], kv: Sequence[int]) -> None:
        self._parents.check(kv)
        everything = [*states, *{page // self.children for page in kv}, *self._free]
        assert len(everything) == self.num_large_pages, "a large page is lost or has two types"
        assert set(everything) == set(range(self.num_large_pages)), "a large page is lost or has two types"
