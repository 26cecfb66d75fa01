"""RadixIndex and PrefixCache against a naive model that keeps every prefix as a tuple."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import ScheduledTokens
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.index import RadixIndex
from hybridcache.prefix.pins import Pin
from hybridcache.prefix.placement import POSITION_MULTIPLE
from hybridcache.prefix.policy import PLACEMENTS, RETENTIONS, PrefixPolicy
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config

SHORT = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
SPEC = CacheSpec.from_config(shipped_config("tiny"), kv_dtype="float32", state_dtype="float32")
STRATEGIES = [
    ("shared_pool", {}),
    ("shared_pool", {"mode": "carve"}),
    ("large_block", {}),
    ("padded_page", {}),
    ("static_split", {}),
    ("two_ended", {}),
    ("byte_exact", {}),
    ("lcm_carve", {}),
]


def ids(tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


class Life:
    """What the index knows of a checkpoint."""

    def __init__(self) -> None:
        self.live, self.was_forgotten = True, False

    def forgotten(self) -> None:
        assert not self.live
        self.was_forgotten = True


class Index(RuleBasedStateMachine):
    """Sequences and checkpoints, all of them remembered, with a set of all prefixes beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.index = RadixIndex()
        self.seen: set[tuple] = {()}
        self.lives: dict[tuple, Life] = {}

    def see(self, tokens) -> None:
        self.seen |= {tokens[:n] for n in range(len(tokens) + 1)}

    @rule(tokens=SHORT, given=st.booleans())
    def insert(self, tokens, given):
        walk = self.index.walk(ids(tokens)) if given else None
        node = self.index.insert(ids(tokens), walk)
        self.see(tokens)
        assert node.end == len(tokens)
        assert tuple(node.prefix().tolist()) == tokens

    @rule(tokens=SHORT)
    def make(self, tokens):
        node = self.index.insert(ids(tokens))
        self.see(tokens)
        if node.point is None:
            node.point = self.lives[tokens] = Life()
        node.point.live = True
        self.index.see(node)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def evict(self, data):
        tokens = data.draw(st.sampled_from(sorted(self.lives)))
        self.lives[tokens].live = False
        self.index.see(self.index.walk(ids(tokens)).node)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def take_out(self, data):
        """A checkpoint of no interest any more, in the middle of a sequence."""
        tokens = data.draw(st.sampled_from(sorted(self.lives)))
        node = self.index.walk(ids(tokens)).node
        if len(node.children) == 1:
            node.point = None
            del self.lives[tokens]
            self.index.join(node)

    @rule(tokens=SHORT)
    def walk(self, tokens):
        walk = self.index.walk(ids(tokens))
        longest = max(n for n in range(len(tokens) + 1) if tokens[:n] in self.seen)
        assert walk.length == longest
        assert tuple(walk.node.prefix().tolist()) == tokens[: walk.node.end]
        if walk.edge is None:
            assert walk.node.end == longest
        else:
            assert walk.edge.parent is walk.node
            assert walk.edge.end > longest or walk.node.end < longest
        found = [tuple(node.prefix().tolist()) for node in walk.node.path() if node.point is not None]
        assert found == [tokens[:n] for n in range(len(tokens), 0, -1) if tokens[:n] in self.lives]

    @invariant()
    def adds_up(self):
        self.index.check()
        ends = {tuple(node.prefix().tolist()): node.point for node in self.index.nodes()}
        assert {tokens: point for tokens, point in ends.items() if point is not None} == self.lives
        assert {tokens[:n] for tokens in ends for n in range(len(tokens) + 1)} | {()} == self.seen


TestIndex = Index.TestCase
TestIndex.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class Known(Sequence):
    """A sequence whose tokens are given."""

    ids: np.ndarray

    def tokens(self, start, end):
        return self.ids[start:end]


BLOCKS = [ids([kind] * POSITION_MULTIPLE) for kind in range(2)]
"""Prompts are made of these and end with a few tokens of their own, so that they often part at the same positions."""


class Cache(RuleBasedStateMachine):
    """Requests that run, end, are preempted and aborted, over a tight pool; a dictionary of live checkpoints beside the cache,
    filled by what it is told to keep, and compared with what requests find."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: PrefixCache | None = None

    @initialize(data=st.data())
    def begin(self, data):
        name, options = data.draw(st.sampled_from(STRATEGIES))
        placement = data.draw(st.lists(st.sampled_from(PLACEMENTS), unique=True))
        policy = PrefixPolicy(
            placement=tuple(placement),
            every=64,
            retention=data.draw(st.sampled_from(RETENTIONS)),
            eviction=data.draw(st.sampled_from([order for order in ORDERS if order != "farthest"])),
            history_tokens=data.draw(st.sampled_from([0, 200, 1 << 20])),
        )
        self.strategy = build(name, spec=SPEC, budget_bytes=6 * SPEC.request_bytes(400), **options)
        self.cache = PrefixCache(self.strategy, policy)
        self.cache.on = True
        self.waiting: list[Known] = []
        self.running: list[Known] = []
        self.pins: list[Pin] = []
        self.next = 0

    def points(self) -> dict[tuple, int]:
        """Live checkpoints, by all of their tokens."""
        return {tuple(point.node.prefix().tolist()): point.key for point in self.cache.points}

    @rule(kinds=st.lists(st.integers(0, 1), max_size=4), tail=SHORT, n=st.integers(1, 3))
    def submit(self, kinds, tail, n):
        tokens = np.concatenate([*(BLOCKS[kind] for kind in kinds), ids(tail)])
        group = []
        for _ in range(n):
            seq = Known(self.next, len(tokens), 4)
            seq.ids = np.concatenate([tokens, ids([self.next % 3, 1, 2, 0])])
            self.next += 1
            group.append(seq)
        for seq in group:
            seq.siblings = tuple(group) if n > 1 else ()
            self.cache.submitted(seq)
            self.waiting.append(seq)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data):
        """One step of one request: up to where its siblings resume, or its whole prompt, then an output token."""
        seq = data.draw(st.sampled_from(self.waiting))
        if self.cache.holds_back(seq):
            assert any(other.seq_id != seq.seq_id for other in self.running), "it waits for nobody"
            return
        found = self.cache.find(seq)
        before = self.points()
        known = tuple(seq.ids[: seq.num_known].tolist())
        deepest = max((p for p in before if len(p) < len(known) and known[: len(p)] == p), key=len, default=())
        assert (0 if found is None else found.position) == len(deepest)
        start = len(deepest)
        end = seq.fork_at if start < seq.fork_at else seq.num_known
        if not self.cache.admit(seq, found, end, urgent=not self.running):
            return
        own = 0 < seq.fork_at == start
        hits = self.cache.hit_tokens
        self.cache.admitted(seq, found, first=not (own or seq.admissions))
        assert self.cache.hit_tokens - hits == (0 if own or seq.admissions else start)
        seq.admissions += 1
        seq.status, seq.num_computed = Status.RUNNING, start
        self.waiting.remove(seq)
        self.running.append(seq)
        self.launch(seq, start, end)

    def launch(self, seq, start, end, fails=False) -> None:
        planned = self.cache.plan([ScheduledTokens(seq, start, end - start)])
        self.strategy.settle_states([seq.seq_id])
        self.cache.keep(planned)
        if fails:
            self.cache.discard(planned, [seq])
            self.wait_again(seq)
            return
        live = self.points()
        for plan in planned:
            if plan.place.value != "fork":
                kept = tuple(seq.ids[: plan.position].tolist()) in live
                assert kept or self.cache.policy.retention != "all"
        seq.num_computed = end
        if end == seq.num_known:
            seq.num_output += 1
            seq.num_settled += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def step(self, data, fails):
        seq = data.draw(st.sampled_from(self.running))
        if seq.num_output == seq.max_tokens:
            self.cache.ending(seq)
            self.leave(seq)
            seq.status = Status.FINISHED
            self.cache.ended(seq)
            return
        while not self.strategy.grow(seq.seq_id, seq.num_known):
            if not self.cache.make_room(urgent=True):
                self.wait_again(seq)
                return
        self.launch(seq, seq.num_computed, seq.num_known, fails)

    def leave(self, seq) -> None:
        self.running.remove(seq)
        self.strategy.release(seq.seq_id)

    def wait_again(self, seq) -> None:
        self.cache.left(seq)
        self.leave(seq)
        seq.status, seq.num_computed = Status.WAITING, 0
        self.waiting.insert(0, seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        self.wait_again(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def abort(self, data):
        seq = data.draw(st.sampled_from(self.running + self.waiting))
        self.cache.left(seq)
        if seq in self.running:
            self.leave(seq)
        else:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        self.cache.ended(seq)

    @rule(kinds=st.lists(st.integers(0, 1), max_size=3), tail=SHORT)
    def pin(self, kinds, tail):
        self.pins.append(self.cache.pin([*np.concatenate([*(BLOCKS[kind] for kind in kinds), ids(tail)]).tolist()]))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        pin = data.draw(st.sampled_from(self.pins))
        self.pins.remove(pin)
        self.cache.unpin(pin)

    @rule(urgent=st.booleans())
    def make_room(self, urgent):
        before, evicted = self.points(), self.cache.evicted
        pinned = {point.key for point in self.cache.points if point.pinned}
        some = self.cache.make_room(urgent=urgent)
        after = self.points()
        assert set(after) <= set(before)
        assert len(before) - len(after) == self.cache.evicted - evicted <= some
        if set(before.values()) - pinned:
            assert pinned <= set(after.values()), "a pinned one went before another"
        if not urgent:
            assert pinned <= set(after.values())

    @invariant()
    def adds_up(self):
        if self.cache is None:
            return
        self.cache.check()
        self.strategy.check_integrity()
        for tokens, key in self.points().items():
            assert self.strategy.cached_tokens(key) == len(tokens)
        pinned = {tuple(pin.tokens[:end].tolist()) for pin in self.pins for end in pin.positions}
        assert {tuple(p.node.prefix().tolist()) for p in self.cache.points if p.pinned} == pinned & set(self.points())

    def teardown(self):
        if self.cache is not None:
            for seq in list(self.running):
                self.cache.left(seq)
                self.leave(seq)
                self.cache.ended(seq)
            while self.cache.make_room(urgent=True):
                self.adds_up()
            usage = self.strategy.usage()
            assert (usage.cached, usage.held) == (0, 0)
            assert usage.free == usage.budget - usage.reserved


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
