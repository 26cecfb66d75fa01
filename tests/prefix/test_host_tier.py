"""The host tier's books: copies against a model of dictionaries, and replays of conversations."""

import random

import pytest
from test_engine import SPEC

from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.eviction import ORDERS
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
        "history_tokens": rng.choice([0, 500, 1 << 20]), "host_eviction": rng.choice(orders),
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
