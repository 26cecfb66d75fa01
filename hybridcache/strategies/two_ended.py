"""two_ended: one buffer, states from one end, KV pages from the other. SGLang's unified memory (``--enable-unified-memory``).

* A slot holds all layers' states of one request; slots grow up from byte 0. A page holds ``page_size`` tokens of K and V for
  all attention layers; pages grow down from the far end. The gap between the two sides serves either.
* A new state is charged ``ceil(S / t)`` tokens at admission (3,144 for Qwen3-Next), beside its prompt's pages.
* Each side reuses its own holes first, the nearest to its end. Where a side must grow and the gap is too small, the other
  side is compacted fully: its outermost units move into its holes. The moved bytes are charged in ``bytes_moved``.

Tables map a request's pages to where they lie now, so a move rewrites one entry. Pages are numbered from the lowest address
that a page can have: page ``i`` lies at ``base + i * page bytes``, and the far end is the highest number. SGLang also moves
up to 4,096 pages when the engine is idle; that only hides cost and is left out.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import ClassVar

import numpy as np

from hybridcache.errors import bad
from hybridcache.memory.free_list import runs
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.spec import STATE_ALIGNMENT, CacheSpec
from hybridcache.strategies.base import Held, Kind, Move, Span, Strategy


@dataclass(eq=False)
class _Request:
    slots: array = field(default_factory=lambda: array("i"))
    """One number: where its states lie, counted from the low end."""
    pages: array = field(default_factory=lambda: array("i"))
    """Where its KV pages lie, counted from the far end."""


class TwoEnded(Strategy):
    """States and KV share one buffer from both ends.

    Args:
        page_size: tokens of a KV page.
    """

    name: ClassVar[str] = "two_ended"
    supports_physical: ClassVar[bool] = True

    def __init__(self, spec: CacheSpec, budget_bytes: int, *, physical: bool = False, page_size: int = 64) -> None:
        super().__init__(spec, budget_bytes, physical=physical)
        if not isinstance(page_size, int) or page_size < 1:
            raise bad("page_size", page_size, "give a whole number of tokens from 1")
        self.page_size = page_size
        self.page_bytes = page_size * spec.kv_bytes_per_token
        self._state_bytes_per_layer = spec.stored_state_bytes_per_layer if physical else spec.state_bytes_per_layer
        self.slot_bytes = self._state_bytes_per_layer * len(spec.state_layers)
        self.state_charge_tokens = -(-self.slot_bytes // spec.kv_bytes_per_token)
        """Tokens of KV that admission charges for one request's states."""
        self._top = budget_bytes // STATE_ALIGNMENT * STATE_ALIGNMENT if physical else budget_bytes
        self._num_pages = self._top // self.page_bytes
        self._slots = _Side()
        self._pages = _Side()
        self._requests: dict[int, _Request] = {}
        self._moves: list[Move] = []
        need = self.slot_bytes + self.page_bytes + 2 * spec.kv_bytes_per_token
        self._require_one_request(need + STATE_ALIGNMENT)

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _unused_bytes(self) -> int:
        """The gap and both sides' holes."""
        return self._top - self._slots.used * self.slot_bytes - self._pages.used * self.page_bytes

    def _gap(self) -> int:
        return self._top - self._slots.reach * self.slot_bytes - self._pages.reach * self.page_bytes

    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool:
        charge = self.state_charge_tokens + self._count(prompt_tokens) * self.page_size
        if charge > self._unused_bytes() // self.spec.kv_bytes_per_token:
            return False
        request = _Request()
        self._requests[seq_id] = request
        if self._slots.growth(1) * self.slot_bytes > self._gap():
            self._compact_pages()
        self._slots.append(request.slots, 1)
        self._append(request, self._count(num_tokens))
        return True

    def _grow(self, seq_id: int, num_tokens: int) -> bool:
        request = self._requests[seq_id]
        more = self._count(num_tokens) - len(request.pages)
        if more * self.page_bytes > self._unused_bytes():
            return False
        self._append(request, more)
        return True

    def _room(self, seq_id: int) -> int:
        return len(self._requests[seq_id].pages) * self.page_size

    def _append(self, request: _Request, pages: int) -> None:
        """The caller has checked that the bytes are there, though perhaps not in one place."""
        if self._pages.growth(pages) * self.page_bytes > self._gap():
            self._compact_slots()
        self._pages.append(request.pages, pages)
        self.table_entries_appended += pages

    def _release(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id)
        self._pages.remove(request.pages)
        self._slots.remove(request.slots)

    def _compact_pages(self) -> None:
        for src, dst in self._pages.compact():
            self._move(self._page_offset(src), self._page_offset(dst), self.page_bytes)

    def _compact_slots(self) -> None:
        for src, dst in self._slots.compact():
            self._move(src * self.slot_bytes, dst * self.slot_bytes, self.slot_bytes)

    def _move(self, src: int, dst: int, num_bytes: int) -> None:
        self.bytes_moved += num_bytes
        if self.physical:
            self._moves.append(Move(src, dst, num_bytes))

    def _page_offset(self, page: int) -> int:
        """Byte offset of a page counted from the far end."""
        return self._top - (page + 1) * self.page_bytes

    def _held(self) -> Held:
        return Held(state=self._slots.used * self.slot_bytes, kv=self._pages.used * self.page_bytes)

    def _reserved(self) -> int:
        return self.budget_bytes - self._top

    def _request_limit(self) -> int:
        tokens = self._top // self.spec.kv_bytes_per_token - self.state_charge_tokens
        return max(tokens, 0) // self.page_size * self.page_size

    def spans(self) -> Iterator[Span]:
        for seq_id, request in self._requests.items():
            yield Span(request.slots[0] * self.slot_bytes, self.slot_bytes, Kind.STATE, seq_id)
            for first, count in runs(request.pages):
                yield Span(self._page_offset(first + count - 1), count * self.page_bytes, Kind.KV, seq_id)

    def _check(self) -> None:
        assert self._gap() >= 0, "the two sides overlap"
        self._slots.check([request.slots for request in self._requests.values()])
        self._pages.check([request.pages for request in self._requests.values()])
        for seq_id, request in self._requests.items():
            assert len(request.slots) == 1
            assert len(request.pages) == self._count(self._tokens[seq_id])

    # -- physical memory -------------------------------------------------------------------------------------------

    def drain_moves(self) -> list[Move]:
        moves, self._moves = self._moves, []
        return moves

    def _kv_table(self, seq_id: int) -> np.ndarray:
        return self._num_pages - 1 - np.array(self._requests[seq_id].pages)

    def _state_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].slots

    def _layout(self) -> Layout:
        layer_bytes = self.page_size * self.spec.kv_bytes_per_token_per_layer
        base = self._top - self._num_pages * self.page_bytes
        return Layout(
            pool_bytes=self._top,
            attention=attention_layout(
                self.spec,
                base=tuple(base + i * layer_bytes for i in range(len(self.spec.attention_layers))),
                tokens_per_entry=self.page_size,
                kernel_block_tokens=self.page_size,
                manager_stride=self.page_bytes,
                kernel_stride=self.page_bytes,
            ),
            state=state_layout(
                self.spec,
                base=tuple(i * self._state_bytes_per_layer for i in range(len(self.spec.state_layers))),
                stride=self.slot_bytes,
            ),
        )


class _Side:
    """Units of one side, numbered from its own end; units ``0 .. reach - 1`` are held or holes, the outermost is held."""

    def __init__(self) -> None:
        self.used = 0
        self._owners: list[tuple[array, int] | None] = []
        """For every unit the array that names it and the index there; None for a hole."""
        self._holes: list[int] = []
        """Heap that contains every hole, and perhaps units that are none any more."""

    @property
    def reach(self) -> int:
        return len(self._owners)

    def growth(self, count: int) -> int:
        """Units by which the side grows when ``count`` more are held."""
        return max(count - (self.reach - self.used), 0)

    def append(self, held: array, count: int) -> None:
        """Append ``count`` units to a request's array: holes first, then units beyond the reach."""
        grown = self.growth(count)
        for _ in range(count - grown):
            unit = self._hole()
            self._owners[unit] = (held, len(held))
            held.append(unit)
        self._owners.extend((held, index) for index in range(len(held), len(held) + grown))
        held.extend(range(self.reach - grown, self.reach))
        self.used += count
        if self.used == self.reach:
            self._holes.clear()

    def _hole(self) -> int:
        """Take the hole nearest to the end; the caller knows that there is one."""
        while True:
            unit = heappop(self._holes)
            if unit < self.reach and self._owners[unit] is None:
                return unit

    def remove(self, held: array) -> None:
        """Give back all units of a request's array."""
        for unit in held:
            self._owners[unit] = None
        self.used -= len(held)
        while self._owners and self._owners[-1] is None:
            self._owners.pop()
        for unit in held:
            if unit < self.reach:
                heappush(self._holes, unit)

    def compact(self) -> Iterator[tuple[int, int]]:
        """Move the outermost units into the holes until none is left; yields ``(from, to)`` in order."""
        while self.used < self.reach:
            hole = self._hole()
            owner = self._owners.pop()
            assert owner is not None
            source = self.reach
            held, index = owner
            held[index] = hole
            self._owners[hole] = owner
            while self._owners and self._owners[-1] is None:
                self._owners.pop()
            yield source, hole

    def check(self, lists: Sequence[array]) -> None:
        """Every held unit names its owner, and every hole can be found."""
        assert not self._owners or self._owners[-1] is not None, "the outermost unit is a hole"
        assert sum(map(len, lists)) == self.used
        for held in lists:
            for index, unit in enumerate(held):
                owner = self._owners[unit]
                assert owner is not None, f"unit {unit} is held and a hole"
                assert owner[0] is held, f"unit {unit} names another owner"
                assert owner[1] == index
        holes = {unit for unit, owner in enumerate(self._owners) if owner is None}
        assert len(holes) == self.reach - self.used
        assert holes <= set(self._holes), "a hole is lost"
