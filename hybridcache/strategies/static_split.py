"""static_split: two pools with a fixed border. SGLang's rule (0.5.15); with ``slots`` also lmdeploy's (0.18.0).

* State slots: ``floor(B * r / (1 + r) / S)`` with the ratio ``r`` (0.9), or a number given by hand (lmdeploy: the largest
  batch and two more). KV gets what is left: ``(B - slots * S) / t`` tokens.
* At most ``min(max_running, tokens // 2, slots // q)`` requests run. SGLang's ``q`` is 1 without prefix caching, 3 with it,
  and 5 with its extra buffer and the overlapped scheduler; with the extra buffer a request holds 3 slots, not 1.
* KV is paged by single tokens; a physical pool pages by 64.

Layer-major: a pool of slots per linear layer, then a pool of pages per attention layer, ``[K|V][token][head][dim]``. Slots that
the cap keeps from any request are *reserved*: they can only ever hold checkpoints.
"""

from array import array
from collections.abc import MutableSequence, Sequence
from math import ceil
from typing import Any, ClassVar

from hybridcache.errors import bad, number, whole
from hybridcache.memory.free_list import FreeList
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.memory.spans import Units
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Cut, Strategy
from hybridcache.strategies.options import whole_or_none

PHYSICAL_PAGE_TOKENS = 64
EXTRA_SLOTS = 2
"""What a request holds beside its live state with the extra buffer."""


class StaticSplit(Strategy):
    """Two pools, fixed at start.

    Args:
        ratio: ``r``, bytes of states over bytes of KV.
        slots: state slots; overrides ``ratio``.
        page_size: tokens of a KV page; 1, or 64 where the pool is physical.
        q: slots that the running cap counts for a request.
        extra_buffer: a request holds 3 slots.
        max_running: largest number of residents asked for; no limit of its own by default.
        placement_seed: shuffle the free slots and pages first (tests).
    """

    name: ClassVar[str] = "static_split"
    supports_physical: ClassVar[bool] = True

    def __init__(
        self, spec: CacheSpec, budget_bytes: int, *, ratio: float = 0.9, slots: int | None = None,
        page_size: int | None = None, q: int = 1, extra_buffer: bool = False, max_running: int | None = None,
        placement_seed: int | None = None, **common: Any,
    ) -> None:  # fmt: skip
        super().__init__(spec, budget_bytes, **common)
        default = PHYSICAL_PAGE_TOKENS if self.physical else 1
        self.page_size = whole("page_size", default if page_size is None else page_size)
        if not isinstance(extra_buffer, bool):
            raise bad("extra_buffer", extra_buffer, "give true or false")
        self.extra_buffer = extra_buffer
        self._slots_held = 1 + EXTRA_SLOTS * extra_buffer
        self._q = whole("q", q, self._slots_held)
        self._asked_slots = whole_or_none("slots", slots, q)
        self._max_running = whole_or_none("max_running", max_running)
        self.ratio = number("ratio", ratio, above=True)
        layer_bytes = spec.stored_state_bytes_per_layer if self.physical else spec.state_bytes_per_layer
        self._state_bytes_per_layer = layer_bytes
        self.slot_bytes = layer_bytes * len(spec.state_layers)
        self.page_bytes = self.page_size * spec.kv_bytes_per_token
        self._placement_seed = whole_or_none("placement_seed", placement_seed, 0)
        self._set_up()

    def _cut(self, pool_bytes: int) -> Cut:
        share, size = self.ratio / (1.0 + self.ratio), self._state_bytes_per_layer
        least_kv = -(-2 // self.page_size) * self.page_bytes
        if self._asked_slots is None:
            self.num_slots = int(pool_bytes * share / self.slot_bytes)
            least = ceil(max(self._q * self.slot_bytes / share, least_kv * (1.0 + self.ratio))) + 1
        else:
            self.num_slots = self._asked_slots
            least = self.num_slots * self.slot_bytes + least_kv
        start = self.num_slots * self.slot_bytes
        self.num_pages = max(pool_bytes - start, 0) // self.page_bytes
        caps = [self.num_pages * self.page_size // 2, self.num_slots // self._q]
        self.running_cap = min(caps if self._max_running is None else [self._max_running, *caps])
        self._free_slots = FreeList(self.num_slots, placement_seed=self._placement_seed)
        self._free_pages = FreeList(self.num_pages, placement_seed=self._placement_seed)
        page = self.page_size * self.spec.kv_bytes_per_token_per_layer
        return Cut(
            state=Units(tuple(i * self.num_slots * size for i in range(len(self.spec.state_layers))), size),
            states_per_request=1,
            kv=Units(tuple(start + i * self.num_pages * page for i in range(len(self.spec.attention_layers))), page),
            entry_tokens=self.page_size,
            least_bytes=least,
        )

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_pages * self.page_size

    def _fits(self, entries: int, states: bool) -> bool:
        return entries <= len(self._free_pages) and states <= len(self._free_slots)

    def _admits(self, entries: int, states: bool = True) -> bool:
        if len(self._residents) >= self.running_cap:
            return False
        return entries <= len(self._free_pages) and self._slots_held - (not states) <= len(self._free_slots)

    def _take_states(self) -> MutableSequence[int]:
        return self._free_slots.take(1)

    def _extra_states(self) -> Sequence[int]:
        return self._free_slots.take(self._slots_held - 1)

    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        return self._free_pages.take(entries)

    def _give_states(self, units: Sequence[int]) -> None:
        self._free_slots.put_all(units)

    def _give_kv(self, units: Sequence[int]) -> None:
        self._free_pages.put_all(units)

    def _usable_slots(self) -> int:
        """Free slots that further residents can take before the cap keeps them out."""
        return min(len(self._free_slots), (self.running_cap - len(self._residents)) * self._slots_held)

    def _free_bytes(self) -> int:
        return self._usable_slots() * self.slot_bytes + len(self._free_pages) * self.page_bytes

    def _reserved(self) -> int:
        kept = (len(self._free_slots) - self._usable_slots()) * self.slot_bytes
        return self.budget_bytes - self.num_slots * self.slot_bytes - self.num_pages * self.page_bytes + kept

    def _request_limit(self) -> int:
        return self.num_kv_tokens if self.running_cap else 0

    def step_rows(self, asked: int) -> int:
        return min(super().step_rows(asked), self.running_cap)

    def _check(self, states: Sequence[int], kv: Sequence[int]) -> None:
        for free, total, held in ((self._free_slots, self.num_slots, states), (self._free_pages, self.num_pages, kv)):
            everything = [*held, *free]
            assert len(everything) == total, "a slot or page is lost or held twice"
            assert set(everything) == set(range(total)), "a slot or page is lost or held twice"
        assert len(self._residents) <= self.running_cap

    # -- physical memory -------------------------------------------------------------------------------------------

    def _layout(self) -> Layout:
        state, kv = self.cut.state, self.cut.kv
        return Layout(
            pool_bytes=self.num_slots * self.slot_bytes + self.num_pages * self.page_bytes,
            attention=attention_layout(
                self.spec, base=kv.bases, tokens_per_entry=self.page_size, kernel_block_tokens=self.page_size,
                manager_stride=kv.stride, kernel_stride=kv.stride,
            ),
            state=state_layout(self.spec, base=state.bases, stride=state.stride),
        )  # fmt: skip
