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
from collections.abc import MutableSequence, Sequence
from heapq import heappop, heappush
from typing import Any, ClassVar

import numpy as np

from hybridcache.errors import whole
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.memory.spans import Move, Units
from hybridcache.spec import STATE_ALIGNMENT, CacheSpec
from hybridcache.strategies.base import Cut, Strategy


class TwoEnded(Strategy):
    """States and KV share one buffer from both ends.

    Args:
        page_size: tokens of a KV page.
    """

    name: ClassVar[str] = "two_ended"
    supports_physical: ClassVar[bool] = True

    def __init__(self, spec: CacheSpec, budget_bytes: int, *, page_size: int = 64, **common: Any) -> None:
        super().__init__(spec, budget_bytes, **common)
        self.page_size = whole("page_size", page_size)
        self.page_bytes = page_size * spec.kv_bytes_per_token
        self._state_bytes_per_layer = spec.stored_state_bytes_per_layer if self.physical else spec.state_bytes_per_layer
        self.slot_bytes = self._state_bytes_per_layer * len(spec.state_layers)
        self.state_charge_tokens = -(-self.slot_bytes // spec.kv_bytes_per_token)
        """Tokens of KV that admission charges for one request's states."""
        self._set_up()

    def _cut(self, pool_bytes: int) -> Cut:
        self._top = pool_bytes // STATE_ALIGNMENT * STATE_ALIGNMENT if self.physical else pool_bytes
        self._num_pages = self._top // self.page_bytes
        self._slots, self._pages = _Side(), _Side()
        return Cut(
            state=Units((0,), self.slot_bytes),
            states_per_request=1,
            kv=Units((self._top - self._num_pages * self.page_bytes,), self.page_bytes),
            entry_tokens=self.page_size,
            least_bytes=self.slot_bytes + self.page_bytes + 2 * self.spec.kv_bytes_per_token + STATE_ALIGNMENT,
        )

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def _free_bytes(self) -> int:
        """The gap and both sides' holes."""
        return self._top - self._slots.used * self.slot_bytes - self._pages.used * self.page_bytes

    def _gap(self) -> int:
        return self._top - self._slots.reach * self.slot_bytes - self._pages.reach * self.page_bytes

    def _fits(self, entries: int, states: bool) -> bool:
        return entries * self.page_bytes + states * self.slot_bytes <= self._free_bytes()

    def _admits(self, entries: int, states: bool = True) -> bool:
        charge = self.state_charge_tokens * states + entries * self.page_size
        return charge <= self._free_bytes() // self.spec.kv_bytes_per_token

    def _take_states(self) -> MutableSequence[int]:
        if self._slots.growth(1) * self.slot_bytes > self._gap():
            self._compact_pages()
        return array("i", self._slots.take(1))

    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        if self._pages.growth(entries) * self.page_bytes > self._gap():
            self._compact_slots()
        return self._all_flipped(self._pages.take(entries))

    def _give_states(self, units: Sequence[int]) -> None:
        self._slots.give(units)

    def _give_kv(self, units: Sequence[int]) -> None:
        self._pages.give(self._all_flipped(units))

    def _flipped(self, page: int) -> int:
        """Number from the lowest address of a page numbered from the far end, and the other way round."""
        return self._num_pages - 1 - page

    def _all_flipped(self, pages: Sequence[int]) -> list[int]:
        last = self._num_pages - 1
        return [last - page for page in pages]

    def _compact_pages(self) -> None:
        moves = {self._flipped(src): self._flipped(dst) for src, dst in self._pages.compact()}
        self._relocate(moves, self.cut.kv)
        now_at = np.arange(self._num_pages, dtype=np.int32)
        now_at[list(moves)] = list(moves.values())
        for segment in {node for leaf in self._leaves() for node in leaf.path()}:
            _renumber(segment.entries, now_at)
        for seq_id, one in self._residents.items():
            if _renumber(one.kv, now_at):
                self._changed[seq_id] = None

    def _compact_slots(self) -> None:
        moves = dict(self._slots.compact())
        self._relocate(moves, self.cut.state)
        holders = [(seq_id, one.states) for seq_id, one in self._residents.items()]
        for seq_id, states in (*holders, *self._reads.items()):
            if states.units[0] in moves:
                states.units[0] = moves[states.units[0]]
                self._changed[seq_id] = None
        for point in self._checkpoints.values():
            point.states.units[0] = moves.get(point.states.units[0], point.states.units[0])

    def _relocate(self, moves: dict[int, int], place: Units) -> None:
        self.bytes_moved += len(moves) * place.stride
        if self.physical:
            at = place.bases[0]
            self._moves += [
                Move(at + src * place.stride, at + dst * place.stride, place.stride) for src, dst in moves.items()
            ]

    def _reserved(self) -> int:
        return self.budget_bytes - self._top

    def _request_limit(self) -> int:
        tokens = self._top // self.spec.kv_bytes_per_token - self.state_charge_tokens
        return max(tokens, 0) // self.page_size * self.page_size

    def _check(self, states: Sequence[int], kv: Sequence[int]) -> None:
        assert self._gap() >= 0, "the two sides overlap"
        self._slots.check(states)
        self._pages.check(self._all_flipped(kv))

    # -- physical memory -------------------------------------------------------------------------------------------

    def _layout(self) -> Layout:
        layer_bytes = self.page_size * self.spec.kv_bytes_per_token_per_layer
        base = self.cut.kv.bases[0]
        return Layout(
            pool_bytes=self._top,
            attention=attention_layout(
                self.spec, base=tuple(base + i * layer_bytes for i in range(len(self.spec.attention_layers))),
                tokens_per_entry=self.page_size, kernel_block_tokens=self.page_size, manager_stride=self.page_bytes,
                kernel_stride=self.page_bytes,
            ),
            state=state_layout(
                self.spec,
                base=tuple(i * self._state_bytes_per_layer for i in range(len(self.spec.state_layers))),
                stride=self.slot_bytes,
            ),
        )  # fmt: skip


def _renumber(units: array, now_at: np.ndarray) -> bool:
    """Replace unit numbers in place by where the units are now. Returns whether any moved."""
    view = np.frombuffer(units, dtype=np.int32)
    moved = now_at[view]
    if np.array_equal(moved, view):
        return False
    view[:] = moved
    return True


class _Side:
    """Units of one side, numbered from its own end; units ``0 .. reach - 1`` are held or holes, the outermost is held."""

    def __init__(self) -> None:
        self.used = 0
        self._held = bytearray()
        """1 for every held unit, 0 for a hole."""
        self._holes: list[int] = []
        """Heap that contains every hole, and perhaps units that are none any more."""

    @property
    def reach(self) -> int:
        return len(self._held)

    def growth(self, count: int) -> int:
        """Units by which the side grows when ``count`` more are held."""
        return max(count - (self.reach - self.used), 0)

    def take(self, count: int) -> list[int]:
        """``count`` units: the holes nearest to the end first, then units beyond the reach."""
        grown = self.growth(count)
        taken = self._take_holes(count - grown)
        taken.extend(range(self.reach, self.reach + grown))
        self._held.extend(b"\1" * grown)
        self.used += count
        if self.used == self.reach:
            self._holes.clear()
        return taken

    def _take_holes(self, count: int) -> list[int]:
        """The ``count`` holes nearest to the end; the caller knows that there are as many."""
        holes, held, reach, taken = self._holes, self._held, self.reach, list[int]()
        while len(taken) < count:
            unit = heappop(holes)
            if unit < reach and not held[unit]:
                held[unit] = 1
                taken.append(unit)
        return taken

    def give(self, units: Sequence[int]) -> None:
        """Take units back."""
        held, holes = self._held, self._holes
        for unit in units:
            held[unit] = 0
        self.used -= len(units)
        self._trim()
        reach = self.reach
        for unit in units:
            if unit < reach:
                heappush(holes, unit)

    def compact(self) -> list[tuple[int, int]]:
        """Move the outermost units into the holes until none is left; ``(from, to)`` in order."""
        moves = []
        while self.used < self.reach:
            (hole,) = self._take_holes(1)
            self._held.pop()
            moves.append((self.reach, hole))
            self._trim()
        return moves

    def _trim(self) -> None:
        del self._held[self._held.rfind(1) + 1 :]

    def check(self, held: Sequence[int]) -> None:
        """Exactly these units are held, and every hole can be found."""
        assert not self._held or self._held[-1], "the outermost unit is a hole"
        assert len(held) == self.used
        assert set(held) == {unit for unit, is_held in enumerate(self._held) if is_held}, "a unit is lost or held twice"
        holes = {unit for unit, is_held in enumerate(self._held) if not is_held}
        assert len(holes) == self.reach - self.used
        assert holes <= set(self._holes), "a hole is lost"
