"""lcm_carve: a large page is bound to one type while it is used. Jenga's allocator, and TokenSpeed's order of filling.

A strict least common multiple of a KV page and a state is hundreds of MiB for Qwen3-Next, so the usable form takes a
ceiling: a large page is one request's whole state (all layers) rounded up to ``K`` KV pages of ``page_size`` tokens. While any
of its children is used it holds either one state or up to ``K`` KV pages, which several requests may share. Nothing is ever
relocated. Where the next KV pages come from, without prefix caching:

* ``fullest`` (TokenSpeed): the fullest large page with a free child, then an empty large page.
* ``jenga``: a large page that this request already uses, then an empty large page, then any other one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from hybridcache.errors import bad
from hybridcache.memory.free_list import FreeList, runs
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Held, Kind, Span, Strategy
from hybridcache.strategies.parents import Parents

ORDERS = ("fullest", "jenga")


@dataclass
class _Request:
    state: int
    """The large page of its state."""
    pages: list[int] = field(default_factory=list)
    """KV pages, numbered through all large pages."""
    parents: dict[int, None] = field(default_factory=dict)
    """Large pages of its KV pages, in order of first use."""


class LcmCarve(Strategy):
    """Large pages of one state or ``K`` KV pages. Accounting with addresses; not physical.

    Args:
        order: ``fullest`` or ``jenga``.
        page_size: tokens of a KV page.
        placement_seed: shuffle the empty large pages first (tests).
    """

    name: ClassVar[str] = "lcm_carve"

    def __init__(
        self,
        spec: CacheSpec,
        budget_bytes: int,
        *,
        physical: bool = False,
        order: str = "fullest",
        page_size: int = 64,
        placement_seed: int | None = None,
    ) -> None:
        super().__init__(spec, budget_bytes, physical=physical)
        if order not in ORDERS:
            raise bad("order", order, f"choose one of {', '.join(ORDERS)}")
        if not isinstance(page_size, int) or page_size < 1:
            raise bad("page_size", page_size, "give a whole number of tokens from 1")
        self.order = order
        self.page_size = page_size
        self.page_bytes = page_size * spec.kv_bytes_per_token
        self.children = -(-spec.state_bytes // self.page_bytes)
        """``K``: KV pages of one large page."""
        self.large_page_bytes = self.children * self.page_bytes
        self.num_large_pages = budget_bytes // self.large_page_bytes
        self._free = FreeList(self.num_large_pages, placement_seed=placement_seed)
        self._parents = Parents(self.children)
        self._requests: dict[int, _Request] = {}
        self._kv_pages = 0
        self._require_one_request(2 * self.large_page_bytes)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _fits(self, pages: int, large_pages: int = 0) -> bool:
        """Whether ``large_pages`` empty large pages and then ``pages`` KV pages can be had now."""
        empty = len(self._free) - large_pages
        return empty >= 0 and pages <= empty * self.children + self._parents.free_children

    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool:
        if not self._fits(self._pages(prompt_tokens), 1):
            return False
        request = _Request(state=self._free.pop())
        self._requests[seq_id] = request
        self._append(request, self._pages(num_tokens))
        return True

    def _grow(self, seq_id: int, num_tokens: int) -> bool:
        request = self._requests[seq_id]
        more = self._pages(num_tokens) - len(request.pages)
        if not self._fits(more):
            return False
        self._append(request, more)
        return True

    def _room(self, seq_id: int) -> int:
        return len(self._requests[seq_id].pages) * self.page_size

    def _append(self, request: _Request, pages: int) -> None:
        self._kv_pages += pages
        self.table_entries_appended += pages
        while pages:
            parent = self._next(request)
            if parent is None:
                parent = self._free.pop()
                taken = self._parents.open(parent, min(pages, self.children))
            else:
                taken = self._parents.take(parent, pages)
            request.parents[parent] = None
            request.pages += taken
            pages -= len(taken)

    def _next(self, request: _Request) -> int | None:
        """The large page to take children of; None for an empty one."""
        if self.order == "fullest":
            return self._parents.fullest()
        own = self._parents.among(request.parents)
        return own if own is not None or len(self._free) else self._parents.fullest()

    def _release(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id)
        for page in request.pages:
            emptied = self._parents.put(page)
            if emptied is not None:
                self._free.put(emptied)
        self._free.put(request.state)
        self._kv_pages -= len(request.pages)

    def _held(self) -> Held:
        return Held(state=len(self._requests) * self.large_page_bytes, kv=self._kv_pages * self.page_bytes)

    def _reserved(self) -> int:
        return self.budget_bytes - self.num_large_pages * self.large_page_bytes

    def _request_limit(self) -> int:
        return max(self.num_large_pages - 1, 0) * self.children * self.page_size

    def spans(self) -> Iterator[Span]:
        for seq_id, request in self._requests.items():
            yield Span(request.state * self.large_page_bytes, self.large_page_bytes, Kind.STATE, seq_id)
            for first, count in runs(request.pages):
                yield Span(first * self.page_bytes, count * self.page_bytes, Kind.KV, seq_id)

    def _check(self) -> None:
        pages = [page for request in self._requests.values() for page in request.pages]
        self._parents.check(pages)
        bound = {page // self.children for page in pages}
        everything = [request.state for request in self._requests.values()] + list(bound) + list(self._free)
        assert len(everything) == self.num_large_pages, "a large page is lost or has two types"
        assert set(everything) == set(range(self.num_large_pages)), "a large page is lost or has two types"
        for seq_id, request in self._requests.items():
            assert len(request.pages) == self._pages(self._tokens[seq_id])
            assert set(request.parents) == {page // self.children for page in request.pages}
