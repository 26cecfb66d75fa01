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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import ceil
from typing import ClassVar

import numpy as np

from hybridcache.errors import bad
from hybridcache.memory.free_list import FreeList, merged_runs, runs
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Held, Kind, Span, Strategy

PHYSICAL_PAGE_TOKENS = 64
EXTRA_SLOTS = 2
"""What a request holds beside its live state with the extra buffer."""


@dataclass
class _Request:
    slots: list[int]
    pages: array = field(default_factory=lambda: array("i"))


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
        self,
        spec: CacheSpec,
        budget_bytes: int,
        *,
        physical: bool = False,
        ratio: float = 0.9,
        slots: int | None = None,
        page_size: int | None = None,
        q: int = 1,
        extra_buffer: bool = False,
        max_running: int | None = None,
        placement_seed: int | None = None,
    ) -> None:
        super().__init__(spec, budget_bytes, physical=physical)
        self.page_size = page_size if page_size is not None else PHYSICAL_PAGE_TOKENS if physical else 1
        self.extra_buffer = extra_buffer
        self._slots_held = 1 + EXTRA_SLOTS * extra_buffer
        _check_whole("page_size", self.page_size, 1)
        _check_whole("q", q, self._slots_held)
        _check_whole("slots", slots, q)
        _check_whole("max_running", max_running, 1)
        if not ratio > 0:
            raise bad("ratio", ratio, "give a number above 0")
        layer_bytes = spec.stored_state_bytes_per_layer if physical else spec.state_bytes_per_layer
        self._state_bytes_per_layer = layer_bytes
        self.slot_bytes = layer_bytes * len(spec.state_layers)
        self.page_bytes = self.page_size * spec.kv_bytes_per_token
        share = ratio / (1.0 + ratio)
        self.num_slots = int(budget_bytes * share / self.slot_bytes) if slots is None else slots
        self.num_pages = max(budget_bytes - self.num_slots * self.slot_bytes, 0) // self.page_bytes
        caps = [self.num_pages * self.page_size // 2, self.num_slots // q]
        self.running_cap = min(caps if max_running is None else [max_running, *caps])
        self._free_slots = FreeList(self.num_slots, placement_seed=placement_seed)
        self._free_pages = FreeList(self.num_pages, placement_seed=placement_seed)
        self._requests: dict[int, _Request] = {}
        least_kv = -(-2 // self.page_size) * self.page_bytes
        if slots is None:
            need = ceil(max(q * self.slot_bytes / share, least_kv * (1.0 + ratio))) + 1
        else:
            need = slots * self.slot_bytes + least_kv
        self._require_one_request(need)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_pages * self.page_size

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool:
        if len(self._requests) >= self.running_cap or self._pages(prompt_tokens) > len(self._free_pages):
            return False
        request = _Request(slots=self._free_slots.take(self._slots_held))
        self._requests[seq_id] = request
        self._append(request, self._pages(num_tokens))
        return True

    def _grow(self, seq_id: int, num_tokens: int) -> bool:
        request = self._requests[seq_id]
        more = self._pages(num_tokens) - len(request.pages)
        if more > len(self._free_pages):
            return False
        self._append(request, more)
        return True

    def _room(self, seq_id: int) -> int:
        return len(self._requests[seq_id].pages) * self.page_size

    def _append(self, request: _Request, pages: int) -> None:
        request.pages.extend(self._free_pages.take(pages))
        self.table_entries_appended += pages

    def _release(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id)
        self._free_slots.put_all(request.slots)
        self._free_pages.put_all(request.pages)

    def _held(self) -> Held:
        return Held(
            state=(self.num_slots - len(self._free_slots)) * self.slot_bytes,
            kv=(self.num_pages - len(self._free_pages)) * self.page_bytes,
        )

    def _reserved(self) -> int:
        return (
            self.budget_bytes - self.running_cap * self._slots_held * self.slot_bytes - self.num_pages * self.page_bytes
        )

    def _request_limit(self) -> int:
        return self.num_kv_tokens if self.running_cap else 0

    def spans(self) -> Iterator[Span]:
        size, layers = self._state_bytes_per_layer, len(self.spec.state_layers)
        page, bases = self.page_size * self.spec.kv_bytes_per_token_per_layer, self._kv_bases()
        for seq_id, request in self._requests.items():
            for first, count in runs(request.slots):
                for layer in range(layers):
                    yield Span((layer * self.num_slots + first) * size, count * size, Kind.STATE, seq_id)
            for first, count in runs(request.pages):
                for base in bases:
                    yield Span(base + first * page, count * page, Kind.KV, seq_id)

    def extents(self) -> dict[Kind, np.ndarray]:
        size, layers = self._state_bytes_per_layer, len(self.spec.state_layers)
        page_size = self.page_size * self.spec.kv_bytes_per_token_per_layer
        requests = self._requests.values()
        slots = merged_runs(chain.from_iterable(request.slots for request in requests))
        pages = merged_runs(chain.from_iterable(request.pages for request in requests))
        return {
            Kind.STATE: _repeated(slots * size, [layer * self.num_slots * size for layer in range(layers)]),
            Kind.KV: _repeated(pages * page_size, self._kv_bases()),
        }

    def _check(self) -> None:
        for free, total, held in (
            (self._free_slots, self.num_slots, [s for request in self._requests.values() for s in request.slots]),
            (self._free_pages, self.num_pages, [p for request in self._requests.values() for p in request.pages]),
        ):
            everything = held + list(free)
            assert len(everything) == total, "a slot or page is lost or has two owners"
            assert set(everything) == set(range(total)), "a slot or page is lost or has two owners"
        assert len(self._requests) <= self.running_cap
        for seq_id, request in self._requests.items():
            assert len(request.pages) == self._pages(self._tokens[seq_id])

    # -- physical memory -------------------------------------------------------------------------------------------

    def _kv_bases(self) -> tuple[int, ...]:
        start = self.num_slots * self.slot_bytes
        pool = self.num_pages * self.page_size * self.spec.kv_bytes_per_token_per_layer
        return tuple(start + i * pool for i in range(len(self.spec.attention_layers)))

    def _kv_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].pages

    def _state_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].slots[:1]

    def _layout(self) -> Layout:
        size = self._state_bytes_per_layer
        page = self.page_size * self.spec.kv_bytes_per_token_per_layer
        return Layout(
            pool_bytes=self.num_slots * self.slot_bytes + self.num_pages * self.page_bytes,
            attention=attention_layout(
                self.spec,
                base=self._kv_bases(),
                tokens_per_entry=self.page_size,
                kernel_block_tokens=self.page_size,
                manager_stride=page,
                kernel_stride=page,
            ),
            state=state_layout(
                self.spec,
                base=tuple(i * self.num_slots * size for i in range(len(self.spec.state_layers))),
                stride=size,
            ),
        )


def _check_whole(name: str, value: int | None, least: int) -> None:
    if value is not None and (not isinstance(value, int) or value < least):
        raise bad(name, value, f"give a whole number from {least}")


def _repeated(extents: np.ndarray, bases: Iterable[int]) -> np.ndarray:
    """The same extents ``[n, 2]`` from every base, ``[bases * n, 2]``."""
    return np.concatenate([extents + np.array([base, 0]) for base in bases])
