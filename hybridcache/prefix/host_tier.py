"""HostTier: checkpoints that leave the device go to host memory, and come back for requests that begin with their tokens.

A copy is made beside the work of the device. Checkpoints that are to go next are *condemned* early, when free memory falls
below a low mark: their copies are made while they still live, so that memory is at hand when it is needed. A request that
resumes from a copy waits in the queue until the checkpoint lives again (a *recall*: states, and the KV that the device has
not, are brought into blocks of the checkpoint's own); others go on.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from hybridcache.prefix.eviction import ReuseDensity
from hybridcache.prefix.host_store import HostCopy, HostStore
from hybridcache.prefix.index import Node
from hybridcache.prefix.points import Point

if TYPE_CHECKING:
    from hybridcache.prefix.live import LiveCheckpoints

HOST_BANDWIDTH = 50e9
"""Bytes per second from pinned memory: PCIe 5 x16, as measured on an H100."""
RECOMPUTED_TOKENS_PER_S = 30e3
"""Prefill of an 80B model on one H100, where nobody says better."""
LOW_MARK = 0.1
"""Part of the budget."""


class Transfer(Protocol):
    """A copy under way."""

    def done(self) -> bool: ...

    def synchronize(self) -> None: ...


class Mover(Protocol):
    """Copies bytes. Where copies are made at once, its methods return None."""

    at_once: bool

    def out(self, key: int, copy: HostCopy) -> Transfer | None:
        """Copy the states of a checkpoint, and the last ``copy.own`` chunks of its KV, to the host."""
        ...

    def back(self, key: int, copy: HostCopy, start: int, num_bytes: int) -> Transfer | None:
        """Copy the states, and the KV from chunk ``start`` of the sequence on, to the device."""
        ...

    def reused(self, transfer: Transfer) -> None:
        """Blocks that a transfer still reads or writes are free from now on: whoever writes them waits for it."""
        ...


def swap_or_recompute(num_bytes: int, bytes_per_s: float, recompute_s: float) -> bool:
    """Whether bringing ``num_bytes`` from the host takes less time than computing them again."""
    return num_bytes < recompute_s * bytes_per_s


class _Recall:
    """A checkpoint on its way back."""

    __slots__ = ("copy", "key", "point", "prompts", "start", "transfer")

    def __init__(self, key: int, copy: HostCopy, start: int, prompt: Any) -> None:
        self.key, self.copy, self.point = key, copy, copy.point
        self.start = start
        """Tokens that the device has."""
        self.prompts = [prompt]
        """Waiting requests that are going to resume from it; the first asked for it."""
        self.transfer: Transfer | None = None


class HostTier:
    """See the module.

    Args:
        cache: whose evicted checkpoints go to the host.
        addressed: whether bytes are really copied (:class:`HostStore`).
        seed: of what is random in the order of eviction.
    """

    def __init__(self, cache: "LiveCheckpoints", *, addressed: bool = False, seed: int = 0) -> None:
        self.cache = cache
        self.store = HostStore(
            cache.strategy.cut, cache.policy, cache.values.work, self._dropped, addressed=addressed, seed=seed
        )
        self.mover: Mover | None = None
        """None where bytes only count."""
        self.bytes_per_s = HOST_BANDWIDTH
        self.recompute_s: Callable[[int, int], float] = lambda start, end: (end - start) / RECOMPUTED_TOKENS_PER_S
        """Seconds of computing tokens ``start .. end - 1`` again."""
        self.low_bytes = int(LOW_MARK * cache.strategy.budget_bytes)
        self.hit_tokens = self.bytes_out = self.bytes_in = 0
        """Tokens that hits found here and not on the device (counted as hits too); bytes copied to the host and back."""
        self.condemned: OrderedDict[Point, None] = OrderedDict()
        """Live checkpoints that go next, whose copies are made or on their way."""
        self.recalls: dict[Point, _Recall] = {}
        self._learn()

    def clear(self) -> None:
        """Forget everything, after all transfers have ended."""
        for recall in self.recalls.values():
            if recall.transfer is not None:
                recall.transfer.synchronize()
        for copy in self.store.copies.values():
            if not copy.done:
                copy.transfer.synchronize()
        self.condemned.clear()
        self.recalls.clear()
        self.store.clear()
        self._learn()

    def _learn(self) -> None:
        """What is learnt of reuse times holds for both tiers."""
        ours, order = self.store.order, self.cache._order
        self._alone = not (isinstance(ours, ReuseDensity) and isinstance(order, ReuseDensity))
        if isinstance(ours, ReuseDensity) and isinstance(order, ReuseDensity):
            ours.times = order.times

    def _dropped(self, copy: HostCopy) -> None:
        self.cache._version += 1
        self.cache.index.see(copy.point.node)
        if copy.point.live and not copy.done:
            self._reuse(copy)

    # -- to the host -----------------------------------------------------------------------------------------------

    def copied(self, point: Point) -> HostCopy | None:
        """The copy of a live checkpoint, begun now where there is none; None where it is not worth its bytes."""
        copy: HostCopy | None = point.host  # type: ignore[assignment]
        if copy is not None:
            return copy
        copy = self.store.put(point, self.cache.now_s)
        if copy is not None:
            if self._alone:
                self.store.order.begun(copy)  # type: ignore[arg-type]
            self.cache._version += 1
            self.bytes_out += (self.store.state_chunks + copy.own) * self.store.chunk_bytes
            if self.mover is not None:
                copy.transfer = self.mover.out(point.key, copy)
        return copy

    def may_evict(self, victim: Point, *, urgent: bool, idle: bool) -> bool:
        """Copy a checkpoint that the order of eviction has chosen. False where it must stay until its copy is made.

        Args:
            victim: the checkpoint.
            urgent: a running request needs the memory, or nobody could run. What is not copied yet is lost then, unless a
                waiting request is going to resume from it.
            idle: nobody runs, so nobody is held up.
        """
        slow = self.mover is not None and not self.mover.at_once
        if slow and urgent and not idle and not victim.wanted and victim.host is None:
            return True
        copy = self.copied(victim)
        if copy is None or copy.done:
            return True
        if urgent:
            return True
        self._condemn(victim)
        return False

    def ready(self, *, urgent: bool, but: Point | None) -> Point | None:
        """A condemned checkpoint whose copy is made; where it is urgent, the one whose copy will be made first."""
        for point in self.condemned:
            copy: HostCopy | None = point.host  # type: ignore[assignment]
            if point is but:
                continue
            if copy is None or copy.done or urgent:
                return point
            break  # copies are made in order
        return None

    def _reuse(self, copy: HostCopy) -> None:
        assert self.mover is not None
        self.mover.reused(copy.transfer)

    def _condemn(self, point: Point) -> None:
        self.cache._order.remove(point)
        self.condemned[point] = None

    def spare(self, point: Point) -> None:
        """A checkpoint is used: it does not go next."""
        self.condemned.pop(point, None)

    def evicting(self, point: Point) -> None:
        """A checkpoint gives its blocks back."""
        self.spare(point)
        copy = point.host
        if isinstance(copy, HostCopy) and not copy.done:
            self._reuse(copy)

    def tend(self) -> None:
        """To be called before each step: end transfers that are done, and condemn checkpoints where memory falls short."""
        self.poll()
        if self.mover is None or not self.cache._points:
            return
        strategy = self.cache.strategy
        missing = self.low_bytes - strategy.usage().free
        missing -= sum(strategy.releasable(point.key) for point in self.condemned)
        while missing > 0:
            point = self.cache._order.victim(self.cache.now_s)
            if point is None:
                break
            missing -= max(strategy.releasable(point.key), 1)
            self.copied(point)
            self._condemn(point)

    # -- and back --------------------------------------------------------------------------------------------------

    def deeper(self, path: Iterable[Node], live: Point | None, tokens: int) -> Point | None:
        """The deepest checkpoint on a path of ``tokens`` tokens, last node first, that is alive, or whose copy is worth
        bringing back."""
        start = 0 if live is None else live.position
        for node in path:
            if node.end <= start:
                break
            point = node.point
            if point is None or point.host is None or node.end >= tokens:
                continue
            if swap_or_recompute(self._missing(point, start), self.bytes_per_s, self.recompute_s(start, node.end)):
                return point  # type: ignore[no-any-return]
        return live

    def _missing(self, point: Point, start: int) -> int:
        """Bytes of a checkpoint that a device lacks which has the KV of ``start`` tokens."""
        store = self.store
        kv = store.kv_chunks(point.position) - start // store.cut.entry_tokens * store.entry_chunks
        return (store.state_chunks + kv) * store.chunk_bytes

    def recall(self, prompt: Any, point: Point, *, urgent: bool) -> bool:
        """Bring a checkpoint back for a request. True where it lives again now; False where it is on its way, or memory is
        short (if ``urgent``, the request does without it from then on)."""
        cache, store = self.cache, self.store
        if point in self.recalls:
            recall = self.recalls[point]
            if prompt not in recall.prompts:
                recall.prompts.append(prompt)
            prompt.recall = recall
            return False
        base, copy = point.live_before(), point.host
        assert isinstance(copy, HostCopy)
        start = 0 if base is None else base.position
        key, num_bytes = cache._new_key(), self._missing(point, start)
        store.pin(copy)
        most = cache.strategy.usage().free + num_bytes
        while not cache.strategy.recall(key, point.position, None if base is None else base.key):
            if cache.strategy.usage().free >= most or not cache.make_room(urgent=urgent, but=base, idle=urgent):
                store.unpin(copy, cache.now_s)
                if urgent and not self.recalls:
                    prompt.on_device, prompt.version = True, -1
                return False
        recall = self.recalls[point] = prompt.recall = _Recall(key, copy, start, prompt)
        self.bytes_in += num_bytes
        if self.mover is not None:
            first = start // store.cut.entry_tokens * store.entry_chunks
            recall.transfer = self.mover.back(key, copy, first, num_bytes)
        self.poll()
        return point.live

    def poll(self) -> None:
        """Let checkpoints live that have arrived."""
        for recall in [r for r in self.recalls.values() if r.transfer is None or r.transfer.done()]:
            self._arrived(recall)

    def wait(self) -> None:
        """Wait for the first recall under way."""
        for recall in self.recalls.values():
            if recall.transfer is not None:
                recall.transfer.synchronize()
            break
        self.poll()

    def _arrived(self, recall: _Recall) -> None:
        cache, point = self.cache, recall.point
        del self.recalls[point]
        self.store.unpin(recall.copy, cache.now_s)
        if point.live:  # somebody computed it meanwhile
            cache.strategy.drop(recall.key)
        else:
            cache._revive(point, recall.key)
        recall.prompts[0].recalled = (point, recall.start)
        for prompt in recall.prompts:
            prompt.recall = None
            if prompt.waits and prompt.wanted is not point:
                cache._release_wanted(prompt)
                cache._protect(point, prompt)
        cache._version += 1

    def cancel(self) -> bool:
        """Give up the last recall, whose memory is needed. False where there is none."""
        if not self.recalls:
            return False
        _point, recall = self.recalls.popitem()
        if recall.transfer is not None and not recall.transfer.done():
            recall.transfer.synchronize()
        self.store.unpin(recall.copy, self.cache.now_s)
        self.cache.strategy.drop(recall.key)
        for prompt in recall.prompts:
            prompt.recall = None
        return True

    # -- reuse and loss --------------------------------------------------------------------------------------------

    def reused(self, point: Point, now_s: float) -> None:
        """A request came that resumes from the checkpoint. To be called before and after its touch."""
        copy = point.host
        if isinstance(copy, HostCopy):
            if self._alone and now_s > point.touched_s:
                self.store.order.reused(copy, now_s)  # type: ignore[arg-type]
            self.store.touched(copy, now_s)

    def void(self, key: int) -> Point | None:
        """The bytes of a checkpoint that had this key are not what they should be: drop its copy. Returns the checkpoint."""
        copy = self.store.copies.get(key)
        if copy is None:
            return None
        while copy.point in self.recalls:
            self.cancel()
        self.forget(copy.point)
        return copy.point

    def forget(self, point: Point) -> None:
        """Drop a copy that the policy does not keep, unless it is being read."""
        copy = point.host
        if isinstance(copy, HostCopy) and not copy.pins:
            self.store.drop(copy)

    def check(self) -> None:
        """Raise AssertionError where the books do not add up."""
        self.store.check(list(self.cache.index.nodes()))
        for point, recall in self.recalls.items():
            assert point.host is recall.copy
            assert recall.copy.pins == 1
        assert all(point.live and not point.wanted for point in self.condemned)
