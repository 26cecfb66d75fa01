"""shared_pool: one pool of uniform manager blocks; any block holds states or KV. hybridcache's own strategy.

The pool is block-major: ``N`` manager blocks of ``M`` bytes. A KV block is ``[kernel block][attention layer][K|V][token]
[head][dim]``; a state block holds the states of ``n`` layers of one request. A request of ``L`` tokens holds
``ceil(layers / n) + ceil(L / Tm)`` blocks. It grew out of lmdeploy PR 4421, which decoupled the block size of the block
manager from that of the kernels.

Modes:

* ``exclusive``: a manager block belongs to one request. Kernels read the manager table as it is.
* ``carve``: the kernel blocks of a manager block may belong to several requests. Whole manager blocks are taken for
  whole manager blocks' worth of tokens; the rest comes from partly used parents, fullest first. The table then has an
  entry per kernel block.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import gcd
from typing import ClassVar

import numpy as np

from hybridcache.errors import bad
from hybridcache.memory.free_list import FreeList, merged_runs, runs
from hybridcache.memory.geometry import Geometry, geometry, plan
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Held, Kind, Span, Strategy
from hybridcache.strategies.parents import Parents

MODES = ("exclusive", "carve")
EMPTY = np.empty(0, dtype=np.int32)


@dataclass
class _Request:
    states: list[int]
    """Manager blocks that hold this request's states."""
    state_table: array
    kv: array = field(default_factory=lambda: array("i"))
    """Table entries: manager blocks (``exclusive``) or kernel blocks (``carve``)."""


class SharedPool(Strategy):
    """One pool of uniform manager blocks.

    Args:
        mode: ``exclusive`` or ``carve``.
        kernel_block_tokens, kernel_blocks_per_manager_block, states_per_manager_block: a geometry chosen by hand, all
            three together; the planner's first choice otherwise.
        placement_seed: shuffle the free blocks first (tests).
    """

    name: ClassVar[str] = "shared_pool"
    supports_physical: ClassVar[bool] = True

    def __init__(
        self,
        spec: CacheSpec,
        budget_bytes: int,
        *,
        physical: bool = False,
        mode: str = "exclusive",
        kernel_block_tokens: int | None = None,
        kernel_blocks_per_manager_block: int | None = None,
        states_per_manager_block: int | None = None,
        placement_seed: int | None = None,
    ) -> None:
        super().__init__(spec, budget_bytes, physical=physical)
        if mode not in MODES:
            raise bad("mode", mode, f"choose one of {', '.join(MODES)}")
        self.mode = mode
        self.geometry = _geometry(spec, kernel_block_tokens, kernel_blocks_per_manager_block, states_per_manager_block)
        self._block_bytes = self.geometry.manager_block_bytes
        self._children = self.geometry.kernel_blocks_per_manager_block
        self._entry_tokens = (
            self.geometry.manager_block_tokens if mode == "exclusive" else self.geometry.kernel_block_tokens
        )
        self._slot_bytes, self._state_unit = _state_slots(spec, self.geometry)
        self.num_blocks = budget_bytes // self._block_bytes
        self._free = FreeList(self.num_blocks, placement_seed=placement_seed)
        self._requests: dict[int, _Request] = {}
        self._state_blocks = 0
        self._kv_entries = 0
        self._parents = Parents(self._children)
        self._require_one_request((self.geometry.state_blocks_per_request + 1) * self._block_bytes)

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def _entries(self, num_tokens: int) -> int:
        return -(-num_tokens // self._entry_tokens)

    def _fits(self, entries: int, blocks: int = 0) -> bool:
        """Whether ``blocks`` manager blocks and then ``entries`` table entries can be had now."""
        free = len(self._free) - blocks
        if self.mode == "exclusive":
            return entries <= free
        return free >= 0 and entries <= free * self._children + self._parents.free_children

    def _take(self, entries: int) -> list[int]:
        if self.mode == "exclusive":
            return self._free.take(entries)
        whole = min(entries // self._children, len(self._free))
        taken: list[int] = []
        for block in self._free.take(whole):
            taken += self._parents.open(block, self._children)
        while (missing := entries - len(taken)) > 0:
            parent = self._parents.fullest()
            if parent is None:
                taken += self._parents.open(self._free.pop(), min(missing, self._children))
            else:
                taken += self._parents.take(parent, missing)
        return taken

    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool:
        states = self.geometry.state_blocks_per_request
        if not self._fits(self._entries(prompt_tokens), states):
            return False
        blocks = self._free.take(states)
        request = _Request(states=blocks, state_table=self._state_entries(blocks))
        request.kv.extend(self._take(self._entries(num_tokens)))
        self._requests[seq_id] = request
        self._state_blocks += states
        self._count(len(request.kv))
        return True

    def _grow(self, seq_id: int, num_tokens: int) -> bool:
        request = self._requests[seq_id]
        more = self._entries(num_tokens) - len(request.kv)
        if more <= 0:
            return True
        # Decoding takes one at a time.
        if more == 1 and self.mode == "carve" and (child := self._parents.take_one()) is not None:
            request.kv.append(child)
            self._count(1)
            return True
        if not self._fits(more):
            return False
        request.kv.extend(self._take(more))
        self._count(more)
        return True

    def _room(self, seq_id: int) -> int:
        return len(self._requests[seq_id].kv) * self._entry_tokens

    def _count(self, entries: int) -> None:
        self._kv_entries += entries
        self.table_entries_appended += entries

    def _release(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id)
        if self.mode == "exclusive":
            self._free.put_all(request.kv)
        else:
            for child in request.kv:
                emptied = self._parents.put(child)
                if emptied is not None:
                    self._free.put(emptied)
        self._free.put_all(request.states)
        self._state_blocks -= len(request.states)
        self._kv_entries -= len(request.kv)

    def _held(self) -> Held:
        entry_bytes = self._entry_tokens * self.spec.kv_bytes_per_token
        return Held(state=self._state_blocks * self._block_bytes, kv=self._kv_entries * entry_bytes)

    def _reserved(self) -> int:
        return self.budget_bytes - self.num_blocks * self._block_bytes

    def _request_limit(self) -> int:
        return max(self.num_blocks - self.geometry.state_blocks_per_request, 0) * self.geometry.manager_block_tokens

    def spans(self) -> Iterator[Span]:
        entry_bytes = self._entry_tokens * self.spec.kv_bytes_per_token
        for seq_id, request in self._requests.items():
            for block in request.states:
                yield Span(block * self._block_bytes, self._block_bytes, Kind.STATE, seq_id)
            for first, count in runs(request.kv):
                yield Span(first * entry_bytes, count * entry_bytes, Kind.KV, seq_id)

    def extents(self) -> dict[Kind, np.ndarray]:
        requests = self._requests.values()
        states = merged_runs(chain.from_iterable(request.states for request in requests))
        # Tens of thousands of kernel blocks in carve mode: as arrays.
        kv = merged_runs(np.concatenate([np.frombuffer(request.kv, dtype=np.int32) for request in requests] or [EMPTY]))
        entry_bytes = self._entry_tokens * self.spec.kv_bytes_per_token
        return {Kind.STATE: states * self._block_bytes, Kind.KV: kv * entry_bytes}

    def _check(self) -> None:
        used = {block for request in self._requests.values() for block in request.states}
        kv = [entry for request in self._requests.values() for entry in request.kv]
        parents = set(kv) if self.mode == "exclusive" else {entry // self._children for entry in kv}
        free = list(self._free)
        assert len(set(free)) == len(free), "a block is free twice"
        assert not (used & parents), "a block holds states and KV"
        assert not ((used | parents) & set(free)), "a held block is free"
        assert len(used | parents) + len(free) == self.num_blocks, "a block is lost"
        if self.mode == "carve":
            self._parents.check(kv)
        for seq_id, request in self._requests.items():
            assert len(request.kv) == self._entries(self._tokens[seq_id])

    # -- physical memory -------------------------------------------------------------------------------------------

    def _state_entries(self, blocks: Sequence[int]) -> array:
        n = self.geometry.states_per_manager_block
        return array(
            "i",
            [
                (blocks[i // n] * self._block_bytes + (i % n) * self._slot_bytes) // self._state_unit
                for i in range(len(self.spec.state_layers) if self.physical else 0)
            ],
        )

    def _kv_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].kv

    def _state_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].state_table

    def _layout(self) -> Layout:
        kb, layers = self.geometry.kernel_block_tokens, len(self.spec.attention_layers)
        layer_bytes = kb * self.spec.kv_bytes_per_token_per_layer
        return Layout(
            pool_bytes=self.num_blocks * self._block_bytes,
            attention=attention_layout(
                self.spec,
                base=tuple(i * layer_bytes for i in range(layers)),
                tokens_per_entry=self._entry_tokens,
                kernel_block_tokens=kb,
                manager_stride=self._entry_tokens * self.spec.kv_bytes_per_token,
                kernel_stride=kb * self.spec.kv_bytes_per_token,
            ),
            state=state_layout(self.spec, base=(0,) * len(self.spec.state_layers), stride=self._state_unit),
        )


def _geometry(spec: CacheSpec, kb: int | None, m: int | None, n: int | None) -> Geometry:
    given = {
        "kernel_block_tokens": kb,
        "kernel_blocks_per_manager_block": m,
        "states_per_manager_block": n,
    }
    if all(value is None for value in given.values()):
        return plan(spec)[0]
    for name, value in given.items():
        if value is None:
            raise bad(name, value, f"give all of {', '.join(given)}, or none for the planner's choice")
    assert kb is not None
    assert m is not None
    assert n is not None
    return geometry(spec, kb, m, n)


def _state_slots(spec: CacheSpec, chosen: Geometry) -> tuple[int, int]:
    """``(slot bytes, table unit bytes)``: states of one block lie a slot apart; state tables count in units."""
    even, rest = divmod(chosen.manager_block_bytes, chosen.states_per_manager_block)
    slot = even if rest == 0 and even % 128 == 0 else spec.stored_state_bytes_per_layer
    return slot, gcd(chosen.manager_block_bytes, slot)
