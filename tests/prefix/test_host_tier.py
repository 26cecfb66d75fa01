"""The host tier's books: copies against a model of dictionaries, and replays of conversations."""

import random

import numpy as np
import pytest
from test_engine import SPEC

from hybridcache.errors import UserError
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.host_store import HostStore
from hybridcache.prefix.host_tier import swap_or_recompute
from hybridcache.prefix.index import RadixIndex
from hybridcache.prefix.points import Place, Point
from hybridcache.prefix.policy import PLACEMENTS, RETENTIONS, PrefixPolicy
from hybridcache.sim.replay import Replay
from hybridcache.strategies import build
from hybridcache.workloads import build_workload

STRATEGIES = {
    "byte_exact": {}, "shared_pool": {}, "shared_pool_carve": {"mode": "carve"}, "two_ended": {}, "padded_page": {},
    "static_split": {"page_size": 8}, "lcm_carve": {"page_size": 8}, "large_block": {},
}  # fmt: skip


def policy(rng: random.Random, **given) -> PrefixPolicy:
    orders = [name for name in ORDERS if name != "farthest"]
    drawn = {
        "placement": tuple(name for name in PLACEMENTS if rng.random() < 0.6) or ("generation_end",),
        "every": 64, "retention": rng.choice(RETENTIONS), "eviction": rng.choice(orders),
        "history_tokens": rng.choice([0, 500, 1 << 20]),
        "host_eviction": rng.choice([name for name in orders if name != "lru_path"]),
        "host_state_share": rng.choice([None, 0.5]), "host_bytes": rng.choice([1 << 17, 1 << 18, 1 << 22]),
    }  # fmt: skip
    return PrefixPolicy(**{**drawn, **given})


class Checked(Replay):
    """Looks at the books after every event."""

    def _pass(self, time_s: float) -> None:
        self.prefix.check()
        self.strategy.check_integrity()
        super()._pass(time_s)


def run(name: str, chosen: PrefixPolicy, seed: int, factor: float = 1.3, **shape):
    options = STRATEGIES[name]
    budget = int(factor * (SPEC.request_bytes(700) + 2 * SPEC.state_bytes))
    while True:
        try:
            strategy = build(
                name.removesuffix("_carve") if name != "lcm_carve" else name, spec=SPEC, budget_bytes=budget, **options
            )
            if strategy.request_limit() >= 600:
                break
        except ValueError:
            pass
        budget = int(1.2 * budget)
    shape = {"num_conversations": 8, "first_tokens": 90, "rounds": 4, "output_tokens": 7, "new_tokens": 40, **shape}
    stream = build_workload("conversations", **shape, seed=seed)
    cache = PrefixCache(strategy, chosen, seed=seed)
    result = Checked(stream, strategy, cache, lambda seq: 1.0 + seq.seq_id % 3).run()
    cache.check()
    return result, cache


@pytest.mark.parametrize("name", STRATEGIES)
def test_books_of_replays(name):
    for _ in range(6):
        seed = random.randrange(1 << 31)
        rng = random.Random(seed)
        chosen = policy(rng)
        result, cache = run(name, chosen, seed, rng.choice([1.0, 1.5, 3.0]), paced=rng.choice(["together", "alone"]))
        assert result.host_hit_tokens <= result.hit_tokens <= result.prompt_tokens, (seed, chosen)
        host = cache.host
        for copy in list(host.store.copies.values()):
            host.store.drop(copy)
        assert host.store.num_bytes == 0, seed


def test_the_host_gives_back_what_the_device_evicted():
    """Sixteen conversations whose checkpoints do not fit the device: without a host nothing is found, with one nearly all."""
    found = []
    for host_bytes in (0, 1 << 18, 1 << 22):
        chosen = PrefixPolicy(placement=("generation_end",), retention="all", eviction="lru", host_bytes=host_bytes)
        result, cache = run("byte_exact", chosen, 3, 1.0, num_conversations=16)
        found.append(result.hit_rate)
        if host_bytes:
            assert 0 < result.host_bytes <= host_bytes
            assert result.host_hit_tokens == cache.host_hit_tokens > 0
            assert cache.host.bytes_out > 0 < cache.host.bytes_in
        else:
            assert (result.host_bytes, result.host_hit_tokens, cache.host) == (0, 0, None)
    assert found[0] < found[1] < found[2]
    # All prompts but the first, and of these all that was computed before (a turn's last output token never is).
    assert found[2] == pytest.approx(sum([96, 143, 190]) / sum([90, 137, 184, 231]))


def test_a_host_that_holds_less_than_a_checkpoint_holds_none():
    result, cache = run("byte_exact", policy(random.Random(1), host_bytes=SPEC.state_bytes), 3)
    assert cache.host.bytes_out == 0
    assert result.host_hit_tokens == 0


@pytest.mark.parametrize(("num_bytes", "seconds", "worth"), [(100, 1.1, True), (100, 0.9, False), (0, 0.1, True)])
def test_swap_or_recompute(num_bytes, seconds, worth):
    assert swap_or_recompute(num_bytes, 100.0, seconds) is worth


@pytest.mark.parametrize(
    ("field", "value"),
    [("host_bytes", -1), ("host_state_share", 1.0), ("host_eviction", "random"), ("host_bytes", 0.5)],
)
def test_what_means_nothing_is_refused(field, value):
    with pytest.raises(UserError, match=field):
        PrefixPolicy(**{field: value})


class Model:
    """What the store should hold, in dictionaries of whole prefixes."""

    def __init__(self, store: HostStore) -> None:
        self.store, self.copies = store, {}

    def num_chunks(self) -> int:
        """States of every copy, and every KV entry once: an entry is told from others by all tokens up to its last one, or up
        to the position where it is a copy's last."""
        size, entries = self.store.cut.entry_tokens, set()
        for tokens in self.copies.values():
            entries |= {tuple(tokens[: at + size]) for at in range(0, len(tokens) - size + 1, size)}
        return len(self.copies) * self.store.state_chunks + len(entries) * self.store.entry_chunks


@pytest.mark.parametrize("share", [None, 0.5])
def test_the_store_against_dictionaries(share):
    """Random prefixes that part and go on, at whole entries, so that what is shared is known: bytes are those of the model
    after every change, and every chunk has the copy's own number."""
    seed = random.randrange(1 << 31)
    rng = random.Random(seed)
    strategy = build("shared_pool", spec=SPEC, budget_bytes=1 << 22, mode="carve")
    entry = strategy.cut.entry_tokens
    chosen = PrefixPolicy(host_bytes=40 * SPEC.request_bytes(4 * entry), host_state_share=share)
    index, dropped = RadixIndex(), []
    store = HostStore(strategy.cut, chosen, lambda a, b: float(b - a), dropped.append, addressed=True)
    model = Model(store)
    for number in range(400):
        if model.copies and rng.random() < 0.3:
            copy = rng.choice(list(model.copies))
            store.drop(copy)
        else:
            start = rng.choice([[], *model.copies.values()])
            start = start[: entry * rng.randrange(len(start) // entry + 1)]
            tokens = start + [rng.randrange(3) for _ in range(entry * rng.randrange(1, 5))]
            node = index.insert(np.array(tokens, dtype=np.int32))
            if node.point is not None and node.point.host is not None:
                continue
            node.point = Point(number, node, Place.PROMPT_END, float(number))
            node.point.live = False
            copy = store.put(node.point, float(number))
            assert copy is not None, seed
            index.see(node)
            model.copies[copy] = tokens
            assert copy not in dropped
        for gone in dropped:
            model.copies.pop(gone)
            index.see(gone.point.node)
        dropped.clear()
        assert store.num_bytes == model.num_chunks() * store.chunk_bytes <= chosen.host_bytes, seed
        store.check(list(index.nodes()))
        index.check()
        for copy, mine in model.copies.items():
            found = store.read(copy, 0)
            assert len(found) == len(set(found)) == store.kv_chunks(len(mine))
            assert store.read(copy, 3) == found[3:]
    for one, a in model.copies.items():  # equal beginnings lie in equal chunks, all else apart
        for other, b in model.copies.items():
            same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))) // entry
            mine, theirs = store.read(one, 0), store.read(other, 0)
            assert len(set(mine) & set(theirs)) <= same * store.entry_chunks
