"""shared_pool: one pool of uniform manager blocks; any block holds states or KV. hybridcache's own strategy.

The pool is block-major: ``N`` manager blocks of ``M`` bytes. A KV block is ``[kernel block][attention layer][K|V][token]
[head][dim]``; a state block holds the states of ``n`` layers of one request. A request of ``L`` tokens holds
``ceil(layers / n) + ceil(L / Tm)`` blocks. It grew out of lmdeploy PR 4421, which decoupled the block size of the block
manager from that of the kernels.

Modes:

* ``exclusive``: a manager block belongs to one request. Kernels read the manager table as it is.
* ``carve``: the kernel blocks of a manager block may belong to several requests. Whole manager blocks are taken for
  whole manager blocks' worth of tokens; the rest comes from partly used parents. (The fullest goes first; which one does
  makes no measurable difference: 0.02 % of simulated throughput.) The table then has an entry per kernel block.
"""

from array import array
from collections.abc import MutableSequence, Sequence
from math import gcd
from typing import Any, ClassVar

from hybridcache.errors import bad
from hybridcache.memory.free_list import FreeList
from hybridcache.memory.geometry import Geometry, geometry, plan
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.memory.spans import Units
from hybridcache.spec import CacheSpec
from hybridcache.strategies.base import Cut, Strategy
from hybridcache.strategies.options import whole_or_none
from hybridcache.strategies.parents import Parents

MODES = ("exclusive", "carve")


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
        self, spec: CacheSpec, budget_bytes: int, *, mode: str = "exclusive", kernel_block_tokens: int | None = None,
        kernel_blocks_per_manager_block: int | None = None, states_per_manager_block: int | None = None,
        placement_seed: int | None = None, **common: Any,
    ) -> None:  # fmt: skip
        super().__init__(spec, budget_bytes, **common)
        if mode not in MODES:
            raise bad("mode", mode, f"choose one of {', '.join(MODES)}")
        self.mode = mode
        self._carve = mode == "carve"
        self.geometry = _geometry(spec, kernel_block_tokens, kernel_blocks_per_manager_block, states_per_manager_block)
        self._block_bytes = self.geometry.manager_block_bytes
        self._state_blocks = self.geometry.state_blocks_per_request
        self._children = self.geometry.kernel_blocks_per_manager_block
        self._slot_bytes, self._state_unit = _state_slots(spec, self.geometry)
        self._placement_seed = whole_or_none("placement_seed", placement_seed, 0)
        self._set_up()

    def _cut(self, pool_bytes: int) -> Cut:
        g = self.geometry
        self.num_blocks = pool_bytes // self._block_bytes
        self._free = FreeList(self.num_blocks, placement_seed=self._placement_seed)
        self._parents = Parents(self._children)
        return Cut(
            state=Units((0,), self._block_bytes),
            states_per_request=g.state_blocks_per_request,
            kv=Units((0,), g.kernel_block_bytes if self._carve else self._block_bytes),
            entry_tokens=g.kernel_block_tokens if self._carve else g.manager_block_tokens,
            kernel_tokens=g.kernel_block_tokens,
            least_bytes=(g.state_blocks_per_request + 1) * self._block_bytes,
        )

    def _fits(self, entries: int, states: bool) -> bool:
        free = len(self._free) - self._state_blocks if states else len(self._free)
        if self._carve:
            return free >= 0 and entries <= free * self._children + self._parents.free_children
        return entries <= free

    def _take_states(self) -> MutableSequence[int]:
        return self._free.take(self._state_blocks)

    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        if not self._carve:
            return self._free.take(entries)
        # Decoding takes one at a time.
        if entries == 1 and (child := self._parents.take_one()) is not None:
            return (child,)
        taken: list[int] = []
        for block in self._free.take(min(entries // self._children, len(self._free))):
            taken += self._parents.open(block, self._children)
        while (missing := entries - len(taken)) > 0:
            parent = self._parents.fullest()
            if parent is None:
                taken += self._parents.open(self._free.pop(), min(missing, self._children))
            else:
                taken += self._parents.take(parent, missing)
        return taken

    def _give_states(self, units: Sequence[int]) -> None:
        self._free.put_all(units)

    def _give_kv(self, units: Sequence[int]) -> None:
        if self._carve:
            self._parents.give(units, self._free)
        else:
            self._free.put_all(units)

    def _free_bytes(self) -> int:
        return len(self._free) * self._block_bytes + self._parents.free_children * self.geometry.kernel_block_bytes

    def _reserved(self) -> int:
        return self.budget_bytes - self.num_blocks * self._block_bytes

    def _request_limit(self) -> int:
        return max(self.num_blocks - self.geometry.state_blocks_per_request, 0) * self.geometry.manager_block_tokens

    def _check(self, states: Sequence[int], kv: Sequence[int]) -> None:
        blocks = {entry // self._children for entry in kv} if self._carve else kv
        everything = [*states, *blocks, *self._free]
        assert len(everything) == self.num_blocks, "a block is lost, held twice, or holds states and KV"
        assert set(everything) == set(range(self.num_blocks)), "a block is lost, held twice, or holds states and KV"
        self._parents.check(kv if self._carve else ())

    # -- physical memory -------------------------------------------------------------------------------------------

    def _state_table(self, units: Sequence[int]) -> Sequence[int]:
        if not self.physical:
            return ()
        n = self.geometry.states_per_manager_block
        places = (
            units[i // n] * self._block_bytes + i % n * self._slot_bytes for i in range(len(self.spec.state_layers))
        )
        return array("i", [place // self._state_unit for place in places])

    def _layout(self) -> Layout:
        kb, layers = self.geometry.kernel_block_tokens, len(self.spec.attention_layers)
        layer_bytes = kb * self.spec.kv_bytes_per_token_per_layer
        return Layout(
            pool_bytes=self.num_blocks * self._block_bytes,
            attention=attention_layout(
                self.spec, base=tuple(i * layer_bytes for i in range(layers)), tokens_per_entry=self.cut.entry_tokens,
                kernel_block_tokens=kb, manager_stride=self.cut.kv.stride,
                kernel_stride=self.geometry.kernel_block_bytes,
            ),
            state=state_layout(self.spec, base=(0,) * len(self.spec.state_layers), stride=self._state_unit),
        )  # fmt: skip


def _geometry(spec: CacheSpec, kb: int | None, m: int | None, n: int | None) -> Geometry:
    names = ("kernel_block_tokens", "kernel_blocks_per_manager_block", "states_per_manager_block")
    if kb is None and m is None and n is None:
        return plan(spec)[0]
    if kb is None or m is None or n is None:
        missing = names[(kb, m, n).index(None)]
        raise bad(missing, None, f"give all of {', '.join(names)}, or none for the planner's choice")
    return geometry(spec, kb, m, n)


def _state_slots(spec: CacheSpec, chosen: Geometry) -> tuple[int, int]:
    """``(slot bytes, table unit bytes)``: states of one block lie a slot apart; state tables count in units."""
    even, rest = divmod(chosen.manager_block_bytes, chosen.states_per_manager_block)
    slot = even if rest == 0 and even % 128 == 0 else spec.stored_state_bytes_per_layer
    return slot, gcd(chosen.manager_block_bytes, slot)
