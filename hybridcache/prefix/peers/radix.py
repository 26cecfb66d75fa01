"""RadixPrefix: SGLang's radix cache of hybrid models under its own rules, over static_split and two_ended.

SGLang 0.5.15 (variant None):

* A tree over token ids; a node may hold states beside the KV up to it, and every leaf does. A hit ends at the deepest
  node that holds states, at most all tokens but one.
* Two orders of use. Where slots are short, the states used longest ago go, of whichever node; a leaf goes whole, and an
  inner node keeps its KV. Where KV is short, the leaf used longest ago goes, with the nodes before it that have neither
  states nor another child. A match refreshes its whole path in both orders.
* States are kept once in every prefill chunk: at its end, with the extra buffer at the last multiple of 64 in it, or
  instead at the place (a multiple of 64) up to which KV was found beyond the states, where that lies in the chunk.
* A request that ends hands its states over; with the extra buffer those at the last multiple of 256 that its decode
  reached.
* A running request keeps the node that it resumed from, or made last, from being evicted. A preempted one leaves its
  nodes. (Where states and KV share their bytes, such states go at last before anybody is preempted: a serial replay
  cannot preempt, and the request has read them.)
* ``q`` slots a request (:mod:`~hybridcache.strategies.static_split`): 3, and 5 with the extra buffer.

Variant ``sglang_0.5.18``: of the states, only those that a request resumes from are refreshed.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from hybridcache.errors import bad
from hybridcache.memory.owners import StateSet
from hybridcache.prefix.index import RadixIndex
from hybridcache.prefix.peers.without_host import WithoutHost
from hybridcache.prefix.placement import floor_position
from hybridcache.prefix.planned import Planned
from hybridcache.prefix.points import Place, Point
from hybridcache.strategies.base import Strategy
from hybridcache.strategies.large_block import LargeBlock
from hybridcache.strategies.lcm_carve import LcmCarve
from hybridcache.strategies.static_split import StaticSplit
from hybridcache.strategies.two_ended import TwoEnded

VARIANTS = (None, "sglang_0.5.18")
TRACK_INTERVAL = 256
"""Decoded tokens between two states that a request with the extra buffer keeps."""


class _Short(Strategy):
    """Notes what a refused request for memory lacked."""

    lacks: str | None = None
    """``states``, ``kv``, or None where nothing can be evicted for it."""

    def _fits(self, entries: int, states: bool) -> bool:
        fits = super()._fits(entries, states)  # type: ignore[safe-super]
        if not fits:
            self.lacks = "states" if states and not super()._fits(0, True) else "kv"  # type: ignore[safe-super]
        return fits

    def _admits(self, entries: int, states: bool = True) -> bool:
        admits = super()._admits(entries, states)
        if not admits:
            self.lacks = "states" if states and not super()._admits(0, True) else "kv"
        return admits


class RadixSplit(_Short, StaticSplit):
    """static_split that tells what was short, and whose residents hand over a slot of their own."""

    def _admits(self, entries: int, states: bool = True) -> bool:
        admits = super()._admits(entries, states)
        if not admits and len(self._residents) >= self.running_cap:
            self.lacks = None
        return admits

    def hand_over(self, seq_id: int, key: int, position: int) -> None:
        """As :meth:`checkpoint`, of the states that a request which is about to end keeps in one of its further slots."""
        one = self._residents[seq_id]
        slot, one.extra = one.extra[-1], list(one.extra[:-1])
        self._cached_state_units += 1
        self._cache(key, one, StateSet([slot], self._state_table([slot])), position)


class RadixEnds(_Short, TwoEnded):
    """two_ended that tells what was short."""


class RadixCarve(_Short, LcmCarve):
    """lcm_carve that tells what was short."""


class RadixBlocks(_Short, LargeBlock):
    """large_block that tells what was short."""


class _Run:
    """What is known of a request that waits or runs."""

    __slots__ = ("branch", "locked", "reach", "seq", "tokens")

    def __init__(self, seq: Any) -> None:
        self.seq = seq
        self.tokens = np.empty(0, dtype=np.int32)
        self.reach = self.branch = 0
        """Up to here KV was found; and the last multiple of 64 in it, where states may be missing."""
        self.locked: Point | None = None


class RadixPrefix(WithoutHost):
    """See the module.

    Args:
        strategy: empty.
        variant: None or ``sglang_0.5.18``.
        chunk_tokens: of a prefill chunk.
    """

    donates: ClassVar[bool] = True
    """Whether a request that ends hands its states over."""
    branches: ClassVar[bool] = True
    """Whether states are kept where KV was found beyond them, also without the extra buffer."""
    one_order: ClassVar[str | None] = None
    """The order by which everything is evicted (``states`` or ``kv``), where there is one."""

    def __init__(self, strategy: Any, variant: str | None = None, chunk_tokens: int = 8192) -> None:
        if variant not in VARIANTS:
            raise bad("variant", variant, f"choose one of {VARIANTS}")
        self.strategy, self.variant, self.chunk_tokens = strategy, variant, chunk_tokens
        self.refreshes_path = variant is None
        self.shares_bytes = not isinstance(strategy, StaticSplit)
        self.buffered = bool(getattr(strategy, "extra_buffer", False))
        self.on = True
        self.now_s = 0.0
        self.hit_tokens = self.evicted = 0
        self._next_key = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything; the strategy holds no checkpoint any more."""
        self.index = RadixIndex(0)
        self._runs: dict[int, _Run] = {}
        self._points: dict[int, Point] = {}
        self._states: OrderedDict[Point, None] = OrderedDict()
        """Nodes with states, those used longest ago first."""
        self._leaves: OrderedDict[Point, None] = OrderedDict()
        """The same nodes in the order of their KV's use; a leaf among them may be evicted for its KV."""
        self._handed: dict[int, tuple[int, int]] = {}

    @property
    def points(self) -> list[Point]:
        """The nodes with states, in order of creation."""
        return list(self._points.values())

    # -- finding ---------------------------------------------------------------------------------------------------

    def submitted(self, seq: Any) -> None:
        self._runs[seq.seq_id] = _Run(seq)

    def holds_back(self, seq: Any) -> bool:
        return False

    def find(self, seq: Any) -> Point | None:
        """The deepest node with states."""
        run = self._runs[seq.seq_id]
        if len(run.tokens) != seq.num_known:
            run.tokens = seq.tokens(0, seq.num_known)
        walk = self.index.walk(run.tokens[:-1])
        run.reach, run.branch = walk.length, floor_position(walk.length)
        return next((node.point for node in walk.node.path() if node.point is not None), None)

    def cut(self, seq: Any, start: int, tokens: int) -> int:
        """Chunks of a prompt; in decode, nothing is cut."""
        prefills = start < max(seq.prompt_len, seq.num_known - 1)
        return min(tokens, self.chunk_tokens) if prefills else tokens

    # -- requests --------------------------------------------------------------------------------------------------

    def admit(self, seq: Any, found: Point | None, tokens: int, prompt: int | None = None, *, urgent: bool) -> bool:
        """Take memory for a request; what it lacks is evicted."""
        strategy, seq_id = self.strategy, seq.seq_id
        while True:
            if found is None:
                admitted = strategy.admit(seq_id, tokens, prompt_tokens=prompt)
            else:
                admitted = strategy.restore(seq_id, found.key, tokens, prompt_tokens=prompt)
            if admitted or not self.make_room(urgent=urgent, but=found):
                return admitted

    def admitted(self, seq: Any, found: Point | None, first: bool) -> None:
        if found is None:
            return
        if first:
            self.hit_tokens += found.position
        self._touch(found)
        self._lock(self._runs[seq.seq_id], found)

    def _touch(self, point: Point) -> None:
        """A match: refresh its path; what lies nearest to the root is evicted first."""
        point.touch(self.now_s)
        for node in reversed([*point.node.path()]):
            if node.point is not None:
                self._leaves.move_to_end(node.point)
                if self.refreshes_path or node.point is point:
                    self._states.move_to_end(node.point)

    def _lock(self, run: _Run, point: Point | None) -> None:
        if run.locked is not None:
            run.locked.wanted -= 1
        run.locked = point
        if point is not None:
            point.wanted += 1

    def left(self, seq: Any) -> None:
        run = self._runs.get(seq.seq_id)
        if run is not None:
            self._lock(run, None)
        handed = self._handed.pop(seq.seq_id, None)
        if handed is not None:
            self.strategy.drop(handed[0])

    def ending(self, seq: Any) -> None:
        """The request ends: its states, or those that it tracked, are handed over."""
        computed, seq_id = seq.num_computed, seq.seq_id
        if not self.donates or seq_id not in self._runs or not self.strategy.at_rest(seq_id, computed):
            return
        key = self._new_key()
        if not self.buffered:
            self.strategy.checkpoint(seq_id, key)
        elif (computed := computed // TRACK_INTERVAL * TRACK_INTERVAL) <= seq.prompt_len:
            return  # those of its prompt are in the tree already
        else:
            self.strategy.hand_over(seq_id, key, computed)
        self._handed[seq_id] = (key, computed)

    def ended(self, seq: Any) -> None:
        run = self._runs.pop(seq.seq_id, None)
        if run is None:
            return
        handed = self._handed.pop(seq.seq_id, None)
        if handed is not None:
            self._publish(run, seq.tokens(0, handed[1]), handed[0], Place.GENERATION_END)
        self._lock(run, None)

    def foretell(self, seq: Any, time_s: float) -> None:
        """Nothing is done with it."""

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def plan(self, items: Iterable[Any]) -> list[Planned]:
        """A checkpoint in every prefill chunk."""
        planned = []
        for seq, start, count in items:
            end, run = start + count, self._runs.get(seq.seq_id)
            if run is None or (count == 1 and start >= seq.prompt_len):
                continue
            position = floor_position(end) if self.buffered else end
            if self.branches and start < run.branch < end:
                position = run.branch
            if position <= start or (position <= run.reach and self._node_at(run, seq, position) is not None):
                continue
            key, inside = self._new_key(), position < end
            while inside and not self.strategy.reserve_checkpoint(seq.seq_id, key, position):
                if not self.make_room(urgent=False, but=run.locked):
                    break
            else:
                planned.append(Planned(key, seq, position, Place.INSIDE, inside))
        return planned

    def _node_at(self, run: _Run, seq: Any, position: int) -> Point | None:
        walk = self.index.walk(self._known(run, seq, position))
        return walk.node.point if walk.node.end == position else None

    def _known(self, run: _Run, seq: Any, count: int) -> np.ndarray:
        return run.tokens[:count] if len(run.tokens) >= count else seq.tokens(0, count)

    def keep(self, planned: Iterable[Planned]) -> None:
        """Enter the checkpoints of a step that was launched."""
        for key, seq, position, place, inside in planned:
            if not inside:
                self.strategy.checkpoint(seq.seq_id, key)
            run = self._runs[seq.seq_id]
            self._lock(run, self._publish(run, self._known(run, seq, position), key, place))

    def discard(self, planned: Iterable[Planned], seqs: Iterable[Any] = ()) -> None:
        """Drop the checkpoints of a step that failed."""
        for plan in planned:
            if plan.key in self._points:
                self._evict(self._points[plan.key])
            elif plan.key in self.strategy.cached:
                self.strategy.drop(plan.key)
        for seq in seqs:
            self.left(seq)

    def _publish(self, run: _Run, tokens: np.ndarray, key: int, place: Place) -> Point:
        node = self.index.insert(np.asarray(tokens, dtype=np.int32))
        point = node.point
        if point is not None:  # another request has brought the same
            self.strategy.drop(key)
            self._touch(point)
            return point
        point = node.point = Point(key, node, place, self.now_s)
        self._points[key] = point
        self._states[point] = self._leaves[point] = None
        self.index.see(node)
        self._touch(point)
        return point

    def _new_key(self) -> int:
        self._next_key += 1
        return self._next_key - 1

    # -- memory ----------------------------------------------------------------------------------------------------

    def make_room(self, *, urgent: bool, but: Point | None = None, idle: bool = False) -> bool:
        """Evict one node for what the strategy lacked last. False where none may be."""
        lacks = self.strategy.lacks and (self.one_order or self.strategy.lacks)
        if lacks is None:
            return False
        order = self._states if lacks == "states" else self._leaves

        def first(inner: bool, locked: bool) -> Point | None:
            fits = (p for p in order if p is not but and (locked or not p.wanted) and (inner or not p.node.children))
            return next(fits, None)

        victim = first(lacks == "states", False)
        if victim is None and self.shares_bytes:  # states of inner nodes are bytes for KV as well
            victim = first(True, False) or (first(True, True) if urgent else None)
        if victim is None:
            return False
        self._evict(victim)
        self.evicted += 1
        return True

    def _evict(self, point: Point) -> None:
        self.strategy.drop(point.key)
        del self._points[point.key], self._states[point], self._leaves[point]
        if point.wanted:
            for run in self._runs.values():
                if run.locked is point:
                    self._lock(run, None)
        point.live, node = False, point.node
        node.point = None
        self.index.see(node)
        self.index.trim(node)

    def check(self) -> None:
        """Raise AssertionError where the books do not add up."""
        self.index.check()
        handed = [key for key, _ in self._handed.values()]
        assert sorted([*self._points, *handed]) == sorted(self.strategy.cached)
        nodes = {node.point.key: node.point for node in self.index.nodes() if node.point is not None}
        assert nodes == self._points
        assert self._states.keys() == self._leaves.keys() == set(self._points.values())
        assert all(node.point is not None for node in self.index.nodes() if not node.children), "a leaf has no states"
        for point in self._points.values():
            assert self.strategy.cached_tokens(point.key) == point.position
            assert point.wanted == sum(run.locked is point for run in self._runs.values())
