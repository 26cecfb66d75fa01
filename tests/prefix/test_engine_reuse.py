"""Reuse in the engine: tokens equal those of a run with everything off, whatever the policy, and nothing leaks."""

import random

import pytest
from conversations import converse, draw, expected_outputs
from test_engine import CHUNKED, PHYSICAL, make_engine, make_strategy, smallest_budget

from tests.checks.soak_prefix import any_policy, soak


@pytest.fixture(scope="module")
def some_conversations():
    seed = random.randrange(2**32)
    conversations = draw(seed, 16)
    expected = expected_outputs(make_engine(budget=1 << 22), [c.anew() for c in conversations])
    return conversations, expected, seed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("label", PHYSICAL)
def test_tokens_are_those_of_a_run_without_reuse(label, overlap, some_conversations):
    """Hits, evictions, preemptions and aborts in a tight pool whose released memory is poisoned."""
    conversations, expected, drawn = some_conversations
    for _ in range(2):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        policy = any_policy(rng)
        longest = max(len(c.prompt) + sum(len(new) + p.max_tokens for new, p, _ in c.turns) for c in conversations)
        budget = int(rng.choice([1.3, 2.0, 6.0]) * smallest_budget(lambda b: make_strategy(label, b), longest))
        engine = make_engine(label, budget, CHUNKED, overlap=overlap, poison=True, prefix=policy)

        def check(engine=engine, rng=rng):
            if rng.random() < 0.5:
                engine.strategy.check_integrity()
                engine.prefix.check()

        found = converse(
            engine, [c.anew() for c in conversations], seed, check, aborts=0.01, arrivals=rng.choice([0.3, 0.8])
        )
        assert found == expected, f"conversations {drawn}, run {seed}, {policy}"
        assert not engine.strategy.residents
        while engine.prefix.make_room(urgent=True):
            check()
        usage = engine.strategy.usage()
        assert (usage.cached, usage.free) == (0, usage.budget - usage.reserved), f"run {seed}, {policy}"


def test_a_short_soak_of_the_real_model():
    """:mod:`tests.checks.soak_prefix` with a few conversations."""
    seed = random.randrange(2**31)
    record = soak(1, seed, 3, ["shared_pool", "shared_pool_carve"])
    assert record["equal"] == record["requests"] >= 2, record
    assert not any(row["leaked_bytes"] or row["failed_steps"] for row in record["strategies"].values()), record
