"""Reuse in the engine: tokens equal those of a run with everything off, whatever the policy, and nothing leaks."""

import random

import pytest
from conversations import converse, draw, expected_outputs
from test_engine import CHUNKED, PHYSICAL, make_engine, make_strategy, smallest_budget

from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.policy import PLACEMENTS, RETENTIONS, PrefixPolicy


def any_policy(rng: random.Random, **given) -> PrefixPolicy:
    """A policy at random; every placement, retention and order comes up."""
    placement = tuple(name for name in PLACEMENTS if rng.random() < 0.6) or ("generation_end",)
    drawn = {
        "placement": placement,
        "every": rng.choice([64, 128, 256]),
        "retention": rng.choice(RETENTIONS),
        "last_k": rng.choice([1, 2, 3]),
        "share": rng.choice([0.1, 0.5]),
        "eviction": rng.choice([name for name in ORDERS if name != "farthest"]),
        "history_tokens": rng.choice([0, 500, 1 << 20]),
        "host_bytes": rng.choice([0, 1 << 18, 1 << 20, 1 << 22]),
        "host_state_share": rng.choice([None, 0.4]),
        "host_eviction": rng.choice([name for name in ORDERS if name != "farthest"]),
    }
    return PrefixPolicy(**{**drawn, **given})


@pytest.fixture(scope="module")
def some_conversations():
    seed = random.randrange(2**32)
    conversations = draw(seed, 24)
    expected = expected_outputs(make_engine(budget=1 << 22), [c.anew() for c in conversations])
    return conversations, expected, seed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("label", PHYSICAL)
def test_tokens_are_those_of_a_run_without_reuse(label, overlap, some_conversations):
    """Hits, evictions, preemptions and aborts in a tight pool whose released memory is poisoned."""
    conversations, expected, drawn = some_conversations
    for _ in range(3):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        policy = any_policy(rng)
        longest = max(len(c.prompt) + sum(len(new) + p.max_tokens for new, p, _ in c.turns) for c in conversations)
        budget = int(rng.choice([1.3, 2.0, 6.0]) * smallest_budget(lambda b: make_strategy(label, b), longest))
        engine = make_engine(label, budget, CHUNKED, overlap=overlap, poison=True, prefix=policy)

        def check(engine=engine):
            engine.strategy.check_integrity()
            engine.prefix.check()

        found = converse(engine, [c.anew() for c in conversations], seed, check, aborts=0.01)
        assert found == expected, f"conversations {drawn}, run {seed}, {policy}"
        assert not engine.strategy.residents
        while engine.prefix.make_room(urgent=True):
            check()
        usage = engine.strategy.usage()
        assert (usage.cached, usage.free) == (0, usage.budget - usage.reserved), f"run {seed}, {policy}"
