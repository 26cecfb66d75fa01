"""HostStore: which checkpoints have a copy in host memory, and where in it.

A copy is the states at a checkpoint and the KV before it. KV is shared by copies as by checkpoints on the device: segments of
a tree, held by the copies behind them, so no copy outlives its KV, and KV behind the last copy of a path is gone with it.
Host memory is handed out in chunks, of which a state's and a KV entry's pieces on the device are multiples. Where nothing is
really copied (simulation), chunks are only counted.
"""

from array import array
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from hybridcache.memory.free_list import FreeList
from hybridcache.memory.owners import Segment, SharedKv
from hybridcache.prefix.eviction import Eviction, Values, make_eviction
from hybridcache.prefix.index import Node
from hybridcache.prefix.points import Point
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.strategies.usage import Cut

Chunks = Sequence[int]


class HostCopy:
    """A checkpoint's copy in host memory. An eviction order takes it for a point: what is known of its reuse is the point's."""

    __slots__ = ("credit", "kv", "live", "origin", "own", "pins", "point", "serial", "slot", "states", "transfer")

    def __init__(self, point: Point, own: int) -> None:
        self.point, self.own, self.origin = point, own, point.key
        self.live = True
        self.states: Chunks = ()
        self.kv: Any = None
        """The segment that ends at its position; its last ``own`` chunks were copied with it."""
        self.transfer: Any = None
        """The copy under way; None where it is done at once."""
        self.pins = 0
        """Recalls that read it."""
        self.serial, self.slot, self.credit = 0, -1, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.point, name)

    @property
    def key(self) -> "HostCopy":
        """What its order asks :meth:`HostStore.releasable` with."""
        return self

    @property
    def done(self) -> bool:
        """Whether all bytes have arrived."""
        if self.transfer is not None and self.transfer.done():
            self.transfer = None
        return self.transfer is None

    def live_before(self) -> Point | None:
        """The deepest checkpoint before it that lives on the device or here."""
        node = self.point.node.parent
        while node is not None:
            if node.point is not None and (node.point.live or node.point.host is not None):
                return node.point
            node = node.parent
        return None


class HostStore:
    """See the module.

    Args:
        cut: of the strategy that holds checkpoints on the device.
        policy: bytes, their split, and the order of eviction.
        work: FLOPs of tokens ``a .. b - 1``.
        dropped: called with a copy that was dropped.
        addressed: hand out chunks by number; otherwise they are counted.
        seed: of what is random in an eviction order.
    """

    def __init__(
        self,
        cut: Cut,
        policy: PrefixPolicy,
        work: Callable[[int, int], float],
        dropped: Callable[[HostCopy], None],
        *,
        addressed: bool = False,
        seed: int = 0,
    ) -> None:
        self.cut, self._policy, self._seed = cut, policy, seed
        self._dropped, self._work = dropped, work
        self.chunk_bytes = gcd(cut.state.stride, cut.kv.stride)
        self.num_chunks = policy.host_bytes // self.chunk_bytes
        self.state_chunks = cut.states_per_request * cut.state.num_bytes // self.chunk_bytes
        self.entry_chunks = cut.entry_units * cut.kv.num_bytes // self.chunk_bytes
        share = policy.host_state_share
        self._most_states = self.num_chunks if share is None else int(share * self.num_chunks)
        self._most_kv = self.num_chunks if share is None else self.num_chunks - self._most_states
        self.addressed = addressed
        self.clear()

    def clear(self) -> None:
        """Forget all copies."""
        for copy in getattr(self, "copies", {}).values():
            copy.live, copy.point.host = False, None
        self.order: Eviction = make_eviction(
            self._policy.host_eviction, Values(self._work, self.releasable), seed=self._seed
        )
        self.copies: dict[int, HostCopy] = {}
        """By the key that the checkpoint had on the device when it was copied."""
        self._kv = SharedKv(self._give)
        self._free = FreeList(self.num_chunks if self.addressed else 0)
        self._states = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that copies hold, shared ones once."""
        return (self._states + self._kv.cached) * self.chunk_bytes

    def kv_chunks(self, tokens: int) -> int:
        """Chunks of the KV of the first ``tokens`` tokens."""
        return -(-tokens // self.cut.entry_tokens) * self.entry_chunks

    def put(self, point: Point, now_s: float) -> HostCopy | None:
        """Take memory for a copy of a checkpoint on the device, evicting copies that are worth less; None where all that would
        have to go are worth more. The caller copies the states, and the last ``own`` chunks of the KV."""
        end, at, parent = self.kv_chunks(point.position), 0, None
        known = next((node for node in point.node.path() if node.hosted), None)
        if known is not None:
            at = end if known is point.node else known.end // self.cut.entry_tokens * self.entry_chunks
        if known is not None and at:
            parent = self._kv.ending(_copy_below(known).kv, at)
            parent.holders += 1
        copy = HostCopy(point, end - at)
        if not self._make_room(copy, now_s):
            self.order.remove(copy)  # type: ignore[arg-type]
            copy.live = False
            if parent is not None:
                self._kv.let_go(parent)
            return None
        copy.states, copy.kv = self._take(self.state_chunks), parent
        self._states += self.state_chunks
        if copy.own:
            copy.kv = Segment(parent, self._take(copy.own), end)  # type: ignore[arg-type]
            copy.kv.holders = 1
            self._kv.cached += copy.own
        point.host = copy
        self.copies[point.key] = copy
        _count(point.node, 1)
        self.order.put(copy, now_s)  # type: ignore[arg-type]
        return copy

    def _make_room(self, copy: HostCopy, now_s: float) -> bool:
        if self.state_chunks > self._most_states or copy.own > self._most_kv:
            return False
        self.order.put(copy, now_s)  # type: ignore[arg-type]
        while not self._fits(copy.own):
            victim: Any = self.order.victim(now_s)
            if victim is None or victim is copy:
                return False
            self.drop(victim)
        return True

    def _fits(self, own: int) -> bool:
        states, kv = self._states + self.state_chunks, self._kv.cached + own
        return states <= self._most_states and kv <= self._most_kv and states + kv <= self.num_chunks

    def drop(self, copy: HostCopy) -> None:
        """Give a copy's memory back. Nobody may be reading it."""
        assert not copy.pins
        self.order.remove(copy)  # type: ignore[arg-type]
        copy.live = False
        copy.point.host = None
        del self.copies[copy.origin]
        self._states -= self.state_chunks
        self._give(copy.states)
        self._kv.let_go(copy.kv)
        _count(copy.point.node, -1)
        self._dropped(copy)

    def pin(self, copy: HostCopy) -> None:
        """Keep a copy while it is read."""
        copy.pins += 1
        self.order.remove(copy)  # type: ignore[arg-type]

    def unpin(self, copy: HostCopy, now_s: float) -> None:
        """One reader less."""
        copy.pins -= 1
        if not copy.pins:
            self.order.put(copy, now_s)  # type: ignore[arg-type]

    def touched(self, copy: HostCopy, now_s: float) -> None:
        """What is known of its reuse has changed."""
        if not copy.pins:
            self.order.put(copy, now_s)  # type: ignore[arg-type]

    def releasable(self, copy: Any) -> int:
        """Bytes that dropping a copy would free."""
        chunks, node = self.state_chunks, copy.kv
        if node is None:
            chunks += copy.own
        while node is not None and node.holders == 1:
            chunks, node = chunks + len(node.entries), node.parent
        return chunks * self.chunk_bytes

    def read(self, copy: HostCopy, start: int) -> list[int]:
        """Chunks of a copy's KV from chunk ``start`` of its sequence on, in order."""
        parts: list[Chunks] = []
        for node in copy.kv.path():
            first = node.end - len(node.entries)
            parts.append(node.entries[max(start - first, 0) :])
            if first <= start:
                break
        return [chunk for part in reversed(parts) for chunk in part]

    def check(self, nodes: Sequence[Node]) -> None:
        """Raise AssertionError where the books do not add up."""
        copies = list(self.copies.values())
        assert {id(node.point.host) for node in nodes if node.point is not None and node.point.host is not None} == set(
            map(id, copies)
        ), "a copy is not in the index"
        for node in nodes:
            below = sum(child.hosted for child in node.children.values())
            assert node.hosted == below + (node.point is not None and node.point.host is not None)
        segments = {id(node): node for copy in copies for node in copy.kv.path()}.values()
        holders: dict[int, int] = {}
        for leaf in [copy.kv for copy in copies] + [node.parent for node in segments if node.parent is not None]:
            holders[id(leaf)] = holders.get(id(leaf), 0) + 1
        assert all(node.holders == holders[id(node)] for node in segments)
        assert self._states == len(copies) * self.state_chunks <= self._most_states
        assert self._kv.cached == sum(len(node.entries) for node in segments) <= self._most_kv
        assert self.num_bytes <= self._policy.host_bytes
        for copy in copies:
            assert copy.kv.end == self.kv_chunks(copy.point.position)
            assert copy.live
            assert (copy.slot >= 0) == (not copy.pins), "a copy is lost to eviction"
        if self.addressed:
            held = [c for copy in copies for c in copy.states] + [c for node in segments for c in node.entries]
            assert sorted([*held, *self._free]) == list(range(self.num_chunks)), "a host chunk is lost or held twice"

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> Chunks:
        return array("i", self._free.take(count)) if self.addressed else range(count)

    def _give(self, chunks: Chunks) -> None:
        if self.addressed:
            self._free.put_all(chunks)


def _copy_below(node: Node) -> HostCopy:
    """A copy at or below a node that has some."""
    while node.point is None or node.point.host is None:
        node = next(child for child in node.children.values() if child.hosted)
    return node.point.host  # type: ignore[no-any-return]


def _count(node: Node, change: int) -> None:
    for above in node.path():
        above.hosted += change
