"""Several outputs of one prompt: each is what its key gives alone, and the prompt is computed once."""

import random
from contextlib import suppress
from dataclasses import replace

import pytest
from test_engine import CHUNKED, PHYSICAL, make_engine, make_strategy, smallest_budget
from test_interrupts import InterruptAt

from hybridcache.engine.sampling import CHILD_BITS, SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError
from hybridcache.prefix.policy import PrefixPolicy

PROMPT = [(31 * i + 7) % 101 for i in range(150)]
SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, n=4)
GREEDY = SamplingParams(max_tokens=12, n=3)


def alone(prompt, params, number: int = 0) -> list[list[int]]:
    """Each output by a request for one in an engine of its own: the engine's ``number``-th."""
    found = []
    for child in range(params.n):
        engine = make_engine(budget=1 << 22)
        engine._next_id = number
        seq = engine.add_request(prompt, replace(params, n=1))
        seed, low = seq.key
        seq.key = (seed, low + (child << CHILD_BITS))
        engine.run()
        found.append(seq.output_ids)
    return found


def outputs(seq) -> list[list[int]]:
    return [one.output_ids for one in seq.siblings]


def at_rest(engine) -> None:
    """Nothing is left behind but what a policy keeps."""
    engine.strategy.check_integrity()
    engine.prefix.check()
    assert not engine.strategy.residents
    while engine.prefix.make_room(urgent=True):
        pass
    usage = engine.strategy.usage()
    assert (usage.cached, usage.free) == (0, usage.budget - usage.reserved)


@pytest.fixture(scope="module")
def expected():
    return [alone(PROMPT, SAMPLED, 0), alone(PROMPT[:40], GREEDY, 1), alone(PROMPT[:1], SAMPLED, 2)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("label", PHYSICAL)
def test_outputs_are_those_of_requests_of_their_own_and_the_prompt_is_computed_once(label, overlap, expected):
    engine = make_engine(label, 1 << 21, CHUNKED, overlap=overlap, poison=True)
    seqs = [engine.add_request(PROMPT, SAMPLED), engine.add_request(PROMPT[:40], GREEDY)]
    single = engine.add_request(PROMPT[:1], SAMPLED)  # nothing to share
    while engine.has_work:
        engine.step()
        engine.strategy.check_integrity()
        engine.prefix.check()
    assert [outputs(seq) for seq in (*seqs, single)] == expected
    assert outputs(seqs[1])[0] == outputs(seqs[1])[1] == outputs(seqs[1])[2]
    assert len({tuple(tokens) for tokens in outputs(seqs[0])}) == 4
    computed = sum(shape.total_tokens for shape in engine.runner.model.batches)
    # A step is prepared for some that have ended, with overlap; nothing ends early here.
    decoded = sum(len(one.output_ids) - 1 for seq in (*seqs, single) for one in seq.siblings)
    assert computed == 149 + 4 + 39 + 3 + 4 + decoded
    assert engine.prefix.hit_tokens == 0, "a sibling's tokens are no hit"
    assert [one.refound_tokens for one in seqs[0].siblings] == [0, 149, 149, 149]
    assert not engine.prefix.points
    at_rest(engine)


@pytest.mark.parametrize("label", PHYSICAL)
def test_siblings_that_find_no_memory_wait_and_outputs_stay(label, expected):
    budget = int(1.6 * smallest_budget(lambda b: make_strategy(label, b), len(PROMPT) + 20))
    for overlap in (False, True):
        engine = make_engine(label, budget, CHUNKED, overlap=overlap, poison=True)
        seqs = [engine.add_request(PROMPT, SAMPLED), engine.add_request(PROMPT[:40], GREEDY)]
        engine.run()
        assert [outputs(seq) for seq in seqs] == expected[:2]
        at_rest(engine)


def test_more_siblings_than_rows_take_turns(expected):
    engine = make_engine("shared_pool", 1 << 21, SchedulerConfig(max_running=2, max_tokens_per_step=64))
    seq = engine.add_request(PROMPT, SAMPLED)
    engine.run()
    assert outputs(seq) == expected[0]
    assert all(one.refound_tokens == 149 for one in seq.siblings[1:]), "its checkpoint was kept while they waited"
    at_rest(engine)


def test_randomness_does_not_depend_on_how_many_outputs_earlier_prompts_have():
    found = []
    for n in (1, 3):
        engine = make_engine()
        first = engine.add_request(PROMPT, replace(SAMPLED, n=n))
        later = engine.add_request(PROMPT[:9], replace(SAMPLED, n=1))
        engine.run()
        found.append((first.output_ids, later.output_ids))
    assert found[0] == found[1]


def test_an_abort_ends_all_of_them_wherever_they_stand():
    for steps in range(8):
        for which in (0, 2):
            engine = make_engine("shared_pool", 1 << 21, CHUNKED, overlap=True, poison=True)
            seq = engine.add_request(PROMPT, SAMPLED)
            other = engine.add_request(PROMPT[:9], GREEDY)
            for _ in range(steps):
                engine.step()
            engine.abort(seq.siblings[which].seq_id)
            assert {one.finish_reason for one in seq.siblings} == {"abort"}
            engine.prefix.check()
            engine.run()
            assert {one.finish_reason for one in other.siblings} == {"length"}
            at_rest(engine)


def test_one_that_ends_alone_leaves_the_others():
    engine = make_engine("shared_pool", 1 << 21, CHUNKED)
    plain = alone(PROMPT, SAMPLED)
    stop = next(token for token in plain[1] if all(token not in plain[i] for i in (0, 2, 3)))
    seq = engine.add_request(PROMPT, replace(SAMPLED, stop_token_ids=(stop,)))
    engine.run()
    cut = [*plain]
    cut[1] = plain[1][: plain[1].index(stop) + 1]
    assert outputs(seq) == cut
    assert [one.finish_reason for one in seq.siblings] == ["length", "stop", "length", "length"]
    at_rest(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_is_computed_again(overlap, expected):
    for failing in range(1, 9):
        engine = make_engine("shared_pool", 1 << 21, CHUNKED, overlap=overlap, poison=True)
        forward, calls = engine.runner.model.forward, 0

        def broken(batch, caches, forward=forward, failing=failing):
            nonlocal calls
            calls += 1
            found = forward(batch, caches)
            if calls == failing:
                raise RuntimeError("broken")
            return found

        engine.runner.model.forward = broken
        seqs = [engine.add_request(PROMPT, SAMPLED), engine.add_request(PROMPT[:40], GREEDY)]
        engine.run()
        assert [outputs(seq) for seq in seqs] == expected[:2]
        assert engine.failed_steps
        at_rest(engine)


@pytest.mark.parametrize("label", PHYSICAL)
def test_an_interrupt_at_any_line_loses_nothing(label, expected):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    policy = PrefixPolicy() if rng.random() < 0.5 else None
    engine = make_engine(label, 1 << 21, CHUNKED, overlap=rng.random() < 0.5, prefix=policy)
    seqs = [engine.add_request(PROMPT, SAMPLED), engine.add_request(PROMPT[:40], GREEDY)]
    for _ in range(rng.randrange(5)):
        engine.step()
    with InterruptAt(rng.randrange(1, 300)) as at, suppress(KeyboardInterrupt):
        engine.step()
    engine.run()
    assert [outputs(seq) for seq in seqs] == expected[:2], f"seed {seed}, at {at.where}"
    at_rest(engine)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2", 1025])
def test_other_numbers_are_refused(n):
    with pytest.raises(UserError, match=r"^n="):
        SamplingParams(n=n)
