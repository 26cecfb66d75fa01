"""Checkpoints in the engine: states read in one place and written in another, KV with several owners; the tokens stay."""

import random
from dataclasses import replace

import numpy as np
import pytest
from pool_model import PoolModel
from test_engine import CHUNKED, PHYSICAL, make_engine, run_one_by_one, stream, tight

from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError


def share_states(engine) -> None:
    """From now on a cached owner shares every resident's states after every step, so that the next one writes elsewhere."""
    keys: dict[int, int] = {}
    engine.moved_states = 0
    schedule, next_key = engine.scheduler.schedule, iter(range(10**6, 10**9))
    launch = engine.runner.launch

    def scheduled():
        for seq_id in list(keys):
            if keys[seq_id] in engine.strategy.cached:
                engine.strategy.drop(keys.pop(seq_id))
        for seq_id in engine.strategy.residents:
            keys[seq_id] = next(next_key)
            engine.strategy.checkpoint(seq_id, keys[seq_id])
        engine.scheduler._cohort = None
        return schedule()

    def launched(step):
        for item in step.items:
            read, write = (
                list(getattr(engine.strategy, name)(item.seq.seq_id))
                for name in ("state_read_table", "state_write_table")
            )
            engine.moved_states += item.start > 0 and not set(read) & set(write)
            assert item.start == 0 or not set(read) & set(write), f"request {item.seq.seq_id} writes where it reads"
        return launch(step)

    engine.scheduler.schedule, engine.runner.launch = scheduled, launched


@pytest.fixture(scope="module")
def some_requests():
    seed = random.randrange(2**32)
    requests = stream(seed, 6)
    return requests, run_one_by_one(requests), seed


@pytest.fixture(scope="module")
def alike_requests():
    """Prompts that begin alike, some of which ask for checkpoints; and their tokens."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    head = [rng.randrange(101) for _ in range(200)]
    requests = []
    for i in range(12):
        length = rng.choice([64, 128, 150, 200])
        prompt = head[:length] + [rng.randrange(101) for _ in range(rng.randrange(1, 40))]
        places = tuple(p for p in (64, 128, 192, len(prompt)) if p <= len(prompt))
        params = SamplingParams(max_tokens=rng.randrange(2, 20), checkpoint_at=places if i % 3 == 0 else ())
        requests.append((prompt, params))
    plain = [(prompt, replace(params, checkpoint_at=())) for prompt, params in requests]
    return requests, run_one_by_one(plain), seed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("label", PHYSICAL)
def test_tokens_are_the_same_when_every_step_writes_states_elsewhere(label, overlap, some_requests):
    requests, expected, seed = some_requests
    engine = make_engine(label, 3 * tight(label, requests), CHUNKED, overlap=overlap, poison=True)
    share_states(engine)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    steps = 0
    while engine.has_work:
        engine.step()
        engine.strategy.check_integrity()
        steps += 1
        assert steps < 3000, f"seed {seed}"
    assert [seq.output_ids for seq in seqs] == expected, f"seed {seed}"
    assert engine.moved_states > 50


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("label", PHYSICAL)
def test_prompts_resume_from_checkpoints_and_give_the_same_tokens(label, overlap, alike_requests):
    """Many prompts that begin alike, some long before others, in a tight pool: hits, evictions and preemptions."""
    requests, expected, seed = alike_requests
    rng = random.Random()
    engine = make_engine(
        label, tight(label, requests, factor=rng.choice([1.5, 3.0])), CHUNKED, overlap=overlap, poison=True
    )
    seqs, arriving, steps = [], list(requests), 0
    while arriving or engine.has_work:
        if arriving and (rng.random() < 0.3 or not engine.has_work):
            seqs.append(engine.add_request(*arriving.pop(0)))
        engine.step()
        engine.strategy.check_integrity()
        steps += 1
        assert steps < 3000, f"seed {seed}"
    assert [seq.output_ids for seq in seqs] == expected, f"seed {seed}"
    assert engine.prefix.hit_tokens == sum(seq.hit_tokens for seq in seqs) > 0, f"seed {seed}"
    assert not engine.strategy.residents
    while engine.prefix.make_room(urgent=True):
        engine.strategy.check_integrity()
    assert engine.strategy.usage().cached == 0
    usage = engine.strategy.usage()
    assert usage.free == usage.budget - usage.reserved


def test_a_prompt_resumes_where_another_asked_for_a_checkpoint():
    model = PoolModel()
    engine = make_engine(budget=1 << 22, model=model)
    head = list(range(100)) * 2
    first = engine.add_request([*head, 1, 2], SamplingParams(max_tokens=3, checkpoint_at=(128,)))
    engine.run()
    assert (len(engine.prefix), first.hit_tokens) == (1, 0)
    model.batches.clear()
    second = engine.add_request([*head, 3], SamplingParams(max_tokens=3))
    other = engine.add_request([*head[:127], 0, 3], SamplingParams(max_tokens=3))
    engine.run()
    assert (second.hit_tokens, other.hit_tokens) == (128, 0)
    assert model.batches[0].tokens == (201 - 128) + 129
    prompts = [([*head, 3], SamplingParams(max_tokens=3)), ([*head[:127], 0, 3], SamplingParams(max_tokens=3))]
    assert [second.output_ids, other.output_ids] == run_one_by_one(prompts)


def test_the_end_of_a_prompt_shares_the_states_that_its_request_leaves():
    engine = make_engine(budget=1 << 22)
    prompt = [5, 6, 7]
    engine.add_request(prompt, SamplingParams(max_tokens=4, checkpoint_at=(3,)))
    engine.step()
    (key,) = engine.strategy.cached
    assert engine.strategy.cached_tokens(key) == 3
    engine.run()
    longer = engine.add_request([*prompt, 9, 9], SamplingParams(max_tokens=4))
    engine.run()
    assert longer.hit_tokens == 3
    assert longer.output_ids == run_one_by_one([([*prompt, 9, 9], SamplingParams(max_tokens=4))])[0]


def test_checkpoints_never_cost_a_running_request_its_memory():
    """The pool holds one request and little more: checkpoints go before anybody is preempted."""
    requests = [([i] * 100, SamplingParams(max_tokens=30, checkpoint_at=(64, 100))) for i in range(4)]
    engine = make_engine("shared_pool", tight("shared_pool", requests, factor=1.1), CHUNKED)
    for prompt, params in requests:
        engine.add_request(prompt, params)
        engine.run()
    assert engine.scheduler.num_preemptions == 0
    assert all(seq.finish_reason == "length" for seq in engine.sequences)


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_step_that_fails_leaves_no_checkpoint(where, monkeypatch):
    engine = make_engine(budget=1 << 22, overlap=True)
    launch, failures = engine.runner.launch, iter([RuntimeError("the device failed")])

    def fail(*_):
        for error in failures:
            raise error

    def launched(step):
        flight = launch(step)
        if where == "launch":
            fail()
        wait = flight.wait
        flight.wait = lambda: (fail(), wait())[1]
        return flight

    monkeypatch.setattr(engine.runner, "launch", launched)
    prompt = list(np.random.default_rng().integers(0, 101, 130))
    seq = engine.add_request(prompt, SamplingParams(max_tokens=5, checkpoint_at=(64, 130)))
    engine.step()
    if where == "launch":
        assert len(engine.prefix) == 0
        assert not engine.strategy.cached
    engine.run()
    again = engine.add_request([*prompt, 1], SamplingParams(max_tokens=5))
    engine.run()
    assert again.hit_tokens == 130
    expected = run_one_by_one([(prompt, SamplingParams(max_tokens=5)), ([*prompt, 1], SamplingParams(max_tokens=5))])
    assert [seq.output_ids, again.output_ids] == expected


@pytest.mark.parametrize("where", ["moves", "stopped"])
def test_steps_that_are_not_launched_leave_no_checkpoint(where, monkeypatch):
    """Moves of memory fail before the step; or its request has ended by a stop token, which was seen only then."""
    engine = make_engine(budget=1 << 22, overlap=where == "stopped")
    prompt = [int(token) for token in np.random.default_rng().integers(0, 101, 130)]
    if where == "moves":
        relocate, failures = engine.runner.relocate, iter([RuntimeError("copy failed")])

        def moved():
            for error in failures:
                raise error
            relocate()

        monkeypatch.setattr(engine.runner, "relocate", moved)
    else:
        engine._failures.steps = 1  # somebody was under suspicion once: steps are looked through from then on
    seq = engine.add_request(prompt, SamplingParams(max_tokens=5, checkpoint_at=(64, 128)))
    if where == "stopped":
        plan = engine.prefix.plan

        def planned(items):
            found = plan(items)
            seq.alone_until, other.alone_until = 1000, 1000
            if found:
                engine.scheduler.abort(seq, 0.0)
            return found

        other = engine.add_request(prompt[:20], SamplingParams(max_tokens=5))
        monkeypatch.setattr(engine.prefix, "plan", planned)
    engine.step()
    assert not engine.strategy.cached
    engine.run()
    assert len(engine.strategy.cached) == len(engine.prefix) == (2 if where == "moves" else 0)
    engine.strategy.check_integrity()


@pytest.mark.parametrize("positions", [(0,), "64", (1.5,)])
def test_positions_that_mean_nothing_are_refused(positions):
    with pytest.raises(UserError, match="checkpoint_at="):
        SamplingParams(checkpoint_at=positions)


@pytest.mark.parametrize("position", [65, 131, 200])
def test_positions_that_no_step_can_keep_are_refused(position):
    engine = make_engine(budget=1 << 22)
    with pytest.raises(UserError, match=f"checkpoint_at={position}"):
        engine.add_request([1] * 130, SamplingParams(checkpoint_at=(position,)))
    assert not engine.has_work


def test_a_prompt_that_resumes_is_cut_at_absolute_multiples():
    """From position 70 a budget of 100 tokens reaches 170: the chunk ends at 128. The next one reaches 228 and ends at 192."""
    engine = make_engine(budget=1 << 22, config=SchedulerConfig(max_tokens_per_step=100))
    head = list(range(70))
    engine.add_request(head, SamplingParams(max_tokens=1, checkpoint_at=(70,)))
    engine.run()
    chunks, launch = [], engine.runner.launch
    engine.runner.launch = lambda step: chunks.extend((item.start, item.end) for item in step.items) or launch(step)
    longer = engine.add_request([*head, *range(100), *range(60)], SamplingParams(max_tokens=1))
    engine.run()
    assert longer.hit_tokens == 70
    assert chunks == [(70, 128), (128, 192), (192, 230)]


def test_equal_starts_are_not_equal_prompts():
    """Every prompt but one differs from the checkpoint's in one token, wherever that is."""
    engine = make_engine(budget=1 << 22)
    engine.add_request([1] * 64, SamplingParams(max_tokens=1, checkpoint_at=(64,)))
    engine.run()
    prompts = [[1] * at + [2] + [1] * (64 - at) for at in range(65)]
    seqs = [engine.add_request(prompt, SamplingParams(max_tokens=1)) for prompt in prompts]
    engine.run()
    assert [seq.hit_tokens for seq in seqs] == [0] * 64 + [64]


def test_the_checkpoint_used_longest_ago_is_dropped():
    engine = make_engine(budget=1 << 22)
    for token in (1, 2, 3):
        engine.add_request([token] * 64, SamplingParams(max_tokens=1, checkpoint_at=(64,)))
        engine.run()
    engine.add_request([1] * 64 + [9], SamplingParams(max_tokens=1))  # the oldest is in use again
    engine.run()
    assert engine.prefix.make_room(urgent=True)
    assert engine.prefix.make_room(urgent=True)
    hits = []
    for token in (1, 2, 3):
        hits.append(engine.add_request([token] * 64 + [8], SamplingParams(max_tokens=1)))
        engine.run()
    assert [seq.hit_tokens for seq in hits] == [64, 0, 0]


def test_the_longest_checkpoint_is_found():
    engine = make_engine(budget=1 << 22)
    head = list(range(100)) * 2
    engine.add_request(head, SamplingParams(max_tokens=1, checkpoint_at=(64, 128, 192)))
    engine.run()
    hits = [engine.add_request([*head[:length], 7], SamplingParams(max_tokens=1)) for length in (192, 191, 128, 64)]
    engine.run()
    assert [seq.hit_tokens for seq in hits] == [192, 128, 128, 64]


def test_a_prompt_that_is_a_checkpoint_computes_its_last_token():
    engine = make_engine(budget=1 << 22)
    prompt = list(range(100)) + list(range(28))
    for hits in (0, 64):
        again = engine.add_request(prompt, SamplingParams(max_tokens=3, checkpoint_at=(64, 128)))
        engine.run()
        assert again.hit_tokens == hits
        assert again.output_ids == run_one_by_one([(prompt, SamplingParams(max_tokens=3))])[0]
