"""LiveCheckpoints: the checkpoints over one strategy's memory, what is known of them, and which goes when blocks are short.

The part of :class:`~hybridcache.prefix.cache.PrefixCache` that knows nothing of the steps of requests.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hybridcache.prefix.eviction import NextUse, Values, make_eviction
from hybridcache.prefix.host_tier import HostTier
from hybridcache.prefix.index import Node, RadixIndex
from hybridcache.prefix.pins import Pin, Pins
from hybridcache.prefix.placement import PartingDepths
from hybridcache.prefix.points import Place, Point, Standing
from hybridcache.prefix.policy import OFF, PrefixPolicy
from hybridcache.strategies.base import Strategy


class Prompt:
    """What is kept of a request from its submission to its end."""

    __slots__ = (
        "branch", "fork", "found", "latest", "making", "on_device", "recall", "recalled", "tokens", "version", "waits",
        "wanted", "wanted_at",
    )  # fmt: skip

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.wanted: Point | None = None
        """The checkpoint that is kept for it while it waits."""
        self.branch: Node | None = None
        """Where it parts from another prompt: a checkpoint is made there, once."""
        self.fork: Node | None = None
        """Where its siblings resume."""
        self.waits = True
        self.wanted_at: dict[int, Place] = {}
        """Positions at which it is to keep a checkpoint."""
        self.making: list[Node] = []
        """Nodes of which it is the maker."""
        self.latest: Point | None = None
        """The checkpoint that its next one continues."""
        self.found: Point | None = None
        self.version = -1
        """Of the cache when ``found`` was found."""
        self.recall: Any = None
        """The checkpoint on its way from the host for which it waits."""
        self.recalled: tuple[Point, int] | None = None
        """The checkpoint that was brought back for it, and how many of its tokens the device had."""
        self.on_device = False
        """Whether it does without the host."""


class LiveCheckpoints:
    """All checkpoints over one strategy's memory.

    Args:
        strategy: holds their blocks; nobody else makes cached owners in it.
        policy: None makes only those that requests ask for.
        work: FLOPs of computing tokens ``a .. b - 1`` of a sequence, for the policies that weigh them; None counts tokens.
        next_use: the future, for the bound (:class:`~hybridcache.prefix.eviction.Farthest`).
        seed: of what is random in an eviction order.
        addressed: whether bytes really go to the host and back, where the policy has host memory.
    """

    def __init__(
        self,
        strategy: Strategy,
        policy: PrefixPolicy | None = None,
        *,
        work: Callable[[int, int], float] | None = None,
        next_use: NextUse | None = None,
        seed: int = 0,
        addressed: bool = False,
    ) -> None:
        self.strategy = strategy
        self.policy = policy or OFF
        self.values = Values(work or (lambda a, b: float(b - a)), strategy.releasable)
        self._order = make_eviction(self.policy.eviction, self.values, next_use=next_use, seed=seed)
        self.on = bool(self.policy.placement)
        """Whether requests are looked at: a policy places checkpoints, or a request asked for one."""
        self.now_s = 0.0
        """Time, as the driver of the scheduler tells it before each step."""
        self.hit_tokens = 0
        """Tokens that requests did not have to compute, counted at their first admission."""
        self.host: HostTier | None = None
        """Host memory behind the device; None where there is none."""
        self.evicted = 0
        """Checkpoints evicted since construction."""
        self._places = set(self.policy.placement)
        self._share = int(self.policy.share * strategy.budget_bytes)
        self._next_key = 0
        self._pins = Pins()
        self.clear()
        if self.policy.host_bytes:
            self.host = HostTier(self, addressed=addressed, seed=seed)

    def clear(self) -> None:
        """Forget everything; the strategy holds no checkpoint any more."""
        if self.host is not None:
            self.host.clear()
        self.index = RadixIndex(self.policy.history_tokens)
        self.depths = PartingDepths()
        for point in getattr(self, "_points", {}).values():
            point.live = False
            self._order.remove(point)
        self._points: dict[int, Point] = {}
        """Live checkpoints by key."""
        self._protected: OrderedDict[Point, None] = OrderedDict()
        """Live checkpoints that waiting requests want, in the order in which they came."""
        self._prompts: dict[int, Prompt] = {}
        self._handed: dict[int, tuple[int, int]] = {}
        """``(key, position)`` of what requests that ended left, until all their tokens are known."""
        self._left: OrderedDict[int, Point] = OrderedDict()
        """The checkpoints that the last requests to end left, by request."""
        self._foretold: list[tuple[float, int, list[Point]]] = []
        self._version = 0

    @property
    def host_bytes(self) -> int:
        """Bytes that copies hold in host memory."""
        return 0 if self.host is None else self.host.store.num_bytes

    @property
    def host_hit_tokens(self) -> int:
        """Those of ``hit_tokens`` that came from the host."""
        return 0 if self.host is None else self.host.hit_tokens

    @property
    def recalling(self) -> bool:
        """Whether a checkpoint is on its way from the host."""
        return self.host is not None and bool(self.host.recalls)

    def __len__(self) -> int:
        return len(self._points)

    @property
    def points(self) -> list[Point]:
        """The live checkpoints, in order of creation."""
        return list(self._points.values())

    # -- pins ------------------------------------------------------------------------------------------------------

    def pin(self, tokens: Iterable[int]) -> Pin:
        """From now on, never evict a checkpoint of these tokens for another one. The caller makes them, by a request that asks
        for the pin's positions; where they are lost, a request that begins with them makes those inside its prompt again."""
        self.on = True
        pin = self._pins.add(np.fromiter(tokens, dtype=np.int32))
        for point in self.pinned(pin):
            point.place, point.pinned = Place.EXPLICIT, True
            self._order.remove(point)
            if self.host is not None:
                self.host.spare(point)
        return pin

    def unpin(self, pin: Pin) -> None:
        """Let the pin's checkpoints be evicted as others are. Raises UserError where it is no pin (any more)."""
        self._pins.remove(pin)
        for point in self.pinned(pin):
            point.pinned = self._pins.hold(point)
            self._put(point)

    def pinned(self, pin: Pin) -> list[Point]:
        """The pin's live checkpoints."""
        ends = [(end, self.index.walk(pin.tokens[:end]).node) for end in pin.positions]
        return [node.point for end, node in ends if node.end == end and alive(node)]

    # -- memory ----------------------------------------------------------------------------------------------------

    def make_room(self, *, urgent: bool, but: Point | None = None, idle: bool = False) -> bool:
        """Evict one checkpoint; with host memory behind the device, one whose copy is made. False where none may be.

        Args:
            urgent: for a running request, or where nobody could run otherwise: also those that waiting requests want, and
                pinned ones.
            but: one to be left.
            idle: nobody runs whom a copy to the host would hold up.
        """
        if not self._points and not self._handed:
            return urgent and self.host is not None and self.host.cancel()
        victim = None if self.host is None else self.host.ready(urgent=urgent, but=but)
        if victim is not None:
            self._evict(victim)
            self.evicted += 1
            return True
        if but is not None:
            self._order.remove(but)
        victim = self._order.victim(self.now_s)
        if but is not None and but.live and not but.wanted and not but.pinned:
            self._put(but)
        if victim is None and urgent:
            victim = next((point for point in reversed(self._protected) if point is not but), None)
            if victim is None and self._handed:
                self._drop_handed(next(iter(self._handed)))
                return True
            if victim is None:
                victim = next((point for point in self._points.values() if point is not but), None)
        if victim is None:
            return urgent and self.host is not None and self.host.cancel()
        if self.host is not None and not self.host.may_evict(victim, urgent=urgent, idle=idle):
            return False
        self._evict(victim)
        self.evicted += 1
        return True

    def check(self) -> None:
        """Raise AssertionError where the books do not add up: index, live checkpoints, and what the strategy holds."""
        self.index.check()
        handed = [key for key, _ in self._handed.values()]
        if self.host is not None:
            self.host.check()
            handed += [recall.key for recall in self.host.recalls.values()]
        assert sorted([*self._points, *handed]) == sorted(self.strategy.cached), (
            "a checkpoint has no blocks, or nobody's"
        )
        live = {node.point.key: node.point for node in self.index.nodes() if alive(node)}
        assert live == self._points, "a live checkpoint is not in the index"
        for key, point in self._points.items():
            assert self.strategy.cached_tokens(key) == point.position
            assert point.wanted == sum(prompt.wanted is point for prompt in self._prompts.values())
            assert (point in self._protected) == (point.wanted > 0)
            condemned = self.host is not None and point in self.host.condemned
            assert (point.slot >= 0) == (not point.wanted and not point.pinned and not condemned), (
                "a checkpoint is lost to eviction"
            )
        making = {node for prompt in self._prompts.values() for node in prompt.making}
        assert all(node.maker is not None for node in making)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _new_key(self) -> int:
        self._next_key += 1
        return self._next_key - 1

    def _put(self, point: Point) -> None:
        if not point.wanted and not point.pinned and (self.host is None or point not in self.host.condemned):
            self._order.put(point, self.now_s)

    def _reused_copy(self, point: Point) -> None:
        if self.host is not None and point.host is not None:
            self.host.reused(point, self.now_s)

    def _protect(self, point: Point, prompt: Prompt) -> None:
        prompt.wanted = point
        point.wanted += 1
        self._order.remove(point)
        if self.host is not None:
            self.host.spare(point)
        self._protected[point] = None

    def _release_wanted(self, prompt: Prompt) -> None:
        point, prompt.wanted = prompt.wanted, None
        if point is not None:
            point.wanted -= 1
            if not point.wanted:
                self._protected.pop(point, None)
                if point.live and point.place is Place.FORK:
                    self._evict(point)
                elif point.live:
                    self._put(point)

    def _stop_making(self, prompt: Prompt, position: int | None = None) -> None:
        for node in prompt.making:
            if position is None or node.end == position:
                node.maker = None
        prompt.making = [node for node in prompt.making if node.maker is not None]

    def _drop_handed(self, seq_id: int) -> None:
        handed = self._handed.pop(seq_id, None)
        if handed is not None:
            self.strategy.drop(handed[0])

    def _publish(self, prompt: Prompt, tokens: np.ndarray, key: int, place: Place) -> Point:
        """Enter a checkpoint that the strategy holds under ``key``."""
        node = self.index.insert(tokens.astype(np.int32, copy=False))
        point = node.point
        if point is not None and point.live:  # two requests of one step had the same tokens
            self.strategy.drop(key)
            return point
        if point is None:
            point = node.point = Point(key, node, place, self.now_s)
        else:
            point.key, point.live, point.place, point.made_s = key, True, place, self.now_s
            point.touched_s = point.active_s = self.now_s
            if point.wanted:  # by a request that came before it was evicted, and still waits
                self._protected[point] = None
        if prompt.latest is not None and prompt.latest is not point:
            point.inherit(prompt.latest)
        self._points[key] = point
        point.standing = Standing.SUPERSEDED if place is Place.INSIDE else Standing.LATEST
        point.pinned = self._pins.hold(point)
        self.index.see(node)
        before = point.live_before()
        if before is not None and before.place is not Place.BRANCH:
            self._order.stands(before, Standing.SUPERSEDED)
        self._order.begun(point)
        self._put(point)
        while before is not None:
            before.active_s = self.now_s
            before.inherit(point)
            self._put(before)
            before = before.live_before()
        prompt.latest = point
        self._version += 1
        self._retain(point)
        return point

    def _revive(self, point: Point, key: int) -> None:
        """An evicted checkpoint has come back; the strategy holds it under ``key``."""
        point.key, point.live, point.pinned = key, True, self._pins.hold(point)
        self._points[key] = point
        if point.wanted:
            self._protected[point] = None
        self.index.see(point.node)
        self._put(point)
        before = point.live_before()
        if before is not None:
            self._put(before)

    def _retain(self, point: Point) -> None:
        """Drop checkpoints that the policy does not keep now that there is this one."""
        if self.policy.retention == "last_k":
            kept = 1
            for node in list(point.node.path())[1:]:
                other = node.point
                if other is None or not (other.live or other.host) or other.pinned or other.wanted:
                    continue
                if other.place in (Place.BRANCH, Place.EXPLICIT, Place.FORK) or len(node.children) > 1:
                    continue
                kept += 1
                if kept > self.policy.last_k:
                    self._forsake(other)
        elif self.policy.retention == "budget_share":
            each = self.strategy.cut.states_per_request * self.strategy.cut.state.num_bytes
            while len(self._points) * each > self._share and self.make_room(urgent=False, but=point):
                pass

    def _keep_semantic(self, point: Point) -> None:
        for node in list(point.node.path()):
            other = node.point
            if other is not None and other.place is Place.INSIDE and not other.wanted:
                self._forsake(other)

    def _forsake(self, point: Point) -> None:
        """Drop a checkpoint that the policy does not keep, wherever it is."""
        if self.host is not None:
            self.host.forget(point)
        if point.live:
            self._evict(point)

    def _evict(self, point: Point, dropped: bool = False) -> None:
        """Drop a live checkpoint. Its node stays as long as its tokens are remembered."""
        before, node = point.live_before(), point.node
        if not dropped:
            self.strategy.drop(point.key)
        del self._points[point.key]
        self._protected.pop(point, None)
        if self.host is not None:
            self.host.evicting(point)
        point.live = False
        self._order.remove(point)
        self._version += 1
        after = point.live_after()
        if before is not None:
            if not after and before.standing is Standing.SUPERSEDED:  # its sequence can only be resumed from there now
                before.standing = Standing.LATEST
                before.active_s = point.active_s
                before.inherit(point)
            self._put(before)
        for other in after:
            self._put(other)
        alone = len(node.children) == 1 and node.maker is None and point.host is None
        if point.standing is Standing.SUPERSEDED and after and alone:
            node.point = None
            self.index.join(node)
        else:
            self.index.see(node)


def alive(node: Node) -> bool:
    return node.point is not None and node.point.live
