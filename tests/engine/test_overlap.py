"""Overlap: a step is launched before the last one's tokens are known, and tokens stay the same.

Graphs, where a test has them, are replayed on the CPU by running what they would have recorded, from the same static memory.
"""

import random
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from pool_model import PoolModel
from test_engine import CHUNKED, PHYSICAL, make_engine, make_strategy, run_all, run_one_by_one, stream, tight
from test_graphs import with_graphs

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.sequence import Status
from hybridcache.kernels.backend import make_backend
from hybridcache.observe.metrics import Recorder


@pytest.fixture(params=["eager", "graphs"])
def engine_of(request):
    """Makes an overlapped engine, with and without graphs."""

    def make(*args, overlap=True, **options) -> Engine:
        engine = make_engine(*args, overlap=overlap, **options)
        return with_graphs(engine) if request.param == "graphs" else engine

    return make


@pytest.mark.parametrize("label", PHYSICAL)
def test_random_streams_give_the_tokens_of_requests_run_alone(label, engine_of):
    """Late arrivals, aborts, stop tokens and preemptions; poisoned memory."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    requests = stream(seed)
    full = run_one_by_one(requests)
    for i in rng.sample(range(len(requests)), 4):
        prompt, params = requests[i]
        requests[i] = (prompt, replace(params, stop_token_ids=(rng.choice(full[i]),)))
    expected = [
        tokens[: tokens.index(params.stop_token_ids[0]) + 1] if params.stop_token_ids else tokens
        for tokens, (_, params) in zip(full, requests)
    ]
    engine = engine_of(label, tight(label, requests), CHUNKED, poison=True)
    arriving = list(enumerate(requests))
    seqs, aborted, streamed, steps = {}, set(), {}, 0
    while arriving or engine.has_work:
        if arriving and (rng.random() < 0.6 or not engine.has_work):
            i, (prompt, params) = arriving.pop(0)
            # The engine's own randomness goes by the order of requests.
            seqs[i] = engine.add_request(prompt, params)
            streamed[seqs[i].seq_id] = []
        output = engine.step()
        for seq_id, token in output.new_tokens.items():
            streamed[seq_id].append(token)
        if rng.random() < 0.02:
            alive = [i for i, seq in seqs.items() if seq.status is not Status.FINISHED]
            if alive:
                i = rng.choice(alive)
                engine.abort(seqs[i].seq_id)
                aborted.add(i)
        engine.strategy.check_integrity()
        steps += 1
        assert steps < 3000, f"seed {seed}"
    assert not engine.strategy.residents
    for i, seq in seqs.items():
        assert streamed[seq.seq_id] == seq.output_ids, f"seed {seed}"
        assert seq.num_output == seq.num_settled == len(seq.output_ids), f"seed {seed}"
        if i in aborted:
            assert seq.output_ids == expected[i][: len(seq.output_ids)], f"seed {seed}"
        else:
            assert seq.output_ids == expected[i], f"seed {seed}, request {i}"
            assert seq.finish_reason == ("stop" if requests[i][1].stop_token_ids else "length")
    assert engine.scheduler.num_preemptions > 0 or aborted, f"seed {seed}: the budget was not tight"


@pytest.mark.parametrize("label", PHYSICAL)
@pytest.mark.parametrize("overlap", [True, False])
def test_steps_that_are_launched_again_give_the_same_tokens(label, overlap, engine_of):
    """Greedy requests in a tight pool: most steps decode the same rows one token further; others admit, preempt, end."""
    requests = [
        (prompt, replace(params, temperature=0.0, top_k=0)) for prompt, params in stream(random.randrange(2**32))
    ]
    engine = engine_of(label, tight(label, requests), CHUNKED, overlap=overlap, poison=True)
    launched = Counter()
    for name in ("_launch_anew", "_launch_again"):
        setattr(engine.runner, name, counted(getattr(engine.runner, name), launched, name))
    assert run_all(engine, requests) == run_one_by_one(requests)
    assert launched["_launch_again"] > launched["_launch_anew"] / 2, launched
    assert engine.scheduler.num_preemptions


def counted(function, counter, name):
    def count(*args):
        counter[name] += 1
        return function(*args)

    return count


def test_without_stop_tokens_the_steps_are_those_without_overlap(engine_of):
    """Lengths are known when a step is launched, so overlap changes no step."""
    requests = stream(random.randrange(2**32))
    found = []
    for engine in (
        make_engine("shared_pool", tight("shared_pool", requests), CHUNKED),
        engine_of("shared_pool", tight("shared_pool", requests), CHUNKED),
    ):
        for prompt, params in requests:
            engine.add_request(prompt, params)
        engine.run()
        batches = engine.runner.model.batches
        found.append((batches, engine.scheduler.num_preemptions, [seq.output_ids for seq in engine.sequences]))
    (plain, *rest), (overlapped, *others) = found
    assert rest == others
    graphs = engine.runner.graphs
    if graphs is not None:  # whose padding is in the batch
        assert any(shape.prefill for shape in graphs.shapes)
        plain = [graphs.shape_for(*shape) or shape for shape in plain]
    assert plain == overlapped


def test_a_step_is_launched_before_the_last_tokens_are_known():
    engine = make_engine(overlap=True)
    seq = engine.add_request([1, 2, 3], SamplingParams(max_tokens=3))
    assert engine.step().new_tokens == {}
    assert (seq.num_output, seq.num_settled, len(engine.runner.model.batches)) == (1, 0, 1)
    assert list(engine.step().new_tokens) == [seq.seq_id]
    assert (seq.num_output, seq.num_settled, len(engine.runner.model.batches)) == (2, 1, 2)
    engine.step()
    assert seq.status is Status.ENDING
    assert not engine.strategy.residents, "the last token is never stored, so its memory is free already"
    assert engine.has_work
    assert engine.step().finished == [seq]
    assert not engine.has_work
    assert len(engine.runner.model.batches) == 3


@pytest.mark.parametrize("failing", [1, 3, 6])
def test_a_step_that_fails_is_recomputed(failing, engine_of):
    requests = stream(random.randrange(2**32), 6)
    calls = {"count": 0}

    def fail(batch):
        calls["count"] += 1
        if calls["count"] == failing:
            raise RuntimeError("a kernel failed")

    model = PoolModel(before_forward=fail)
    engine = engine_of(budget=1 << 21, config=CHUNKED, model=model, poison=True)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)
    assert engine.failed_steps == 1
    assert not engine.strategy.residents


@pytest.mark.parametrize("failing", [0, 2, 5])
def test_a_step_that_fails_after_its_launch_voids_the_next_one(failing, engine_of, monkeypatch):
    requests = stream(random.randrange(2**32), 6)
    engine = engine_of(budget=1 << 21, config=CHUNKED, poison=True)
    launch, calls = engine.runner.launch, iter(range(1000))

    def launched(step):
        flight = launch(step)
        if next(calls) == failing:

            def fail():
                raise RuntimeError("the device failed")

            flight.wait = fail
        return flight

    monkeypatch.setattr(engine.runner, "launch", launched)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)
    assert engine.failed_steps == 1
    assert not engine.strategy.residents


def test_logits_that_are_not_finite_end_their_request_only(engine_of):
    engine = engine_of()
    bad_one = engine.add_request([5] * 20, SamplingParams(max_tokens=9))
    good = engine.add_request([6] * 20, SamplingParams(max_tokens=9))
    engine.step()
    engine.step()
    engine.runner.poison(bad_one.seq_id)
    engine.run()
    assert bad_one.finish_reason == "error"
    assert len(bad_one.output_ids) == 2
    assert "not finite" in engine.error(bad_one.seq_id)
    assert good.output_ids == run_one_by_one([([6] * 20, SamplingParams(max_tokens=9))])[0]
    assert engine.failed_steps == 0


def test_moves_that_fail_recompute_everything_running(engine_of, monkeypatch):
    requests = stream(random.randrange(2**32), 4)
    engine = engine_of(budget=1 << 21)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    for _ in range(4):
        engine.step()
    relocate, calls = engine.runner.relocate, iter([RuntimeError("copy failed")])

    def fails_once():
        for error in calls:
            raise error
        relocate()

    monkeypatch.setattr(engine.runner, "relocate", fails_once)
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)


def test_requests_of_one_token_come_one_after_another(engine_of):
    """Their steps decode nothing, and the engine steps once more for a token that is on its way while nobody runs."""
    requests = [([token] * 20, SamplingParams(max_tokens=1)) for token in range(4)]
    engine = engine_of()
    seqs = []
    for prompt, params in requests:
        seqs.append(engine.add_request(prompt, params))
        engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)
    assert not engine.strategy.residents


@pytest.mark.parametrize("where", ["launch", "wait", "advance"])
def test_an_interrupt_leaves_the_engine_consistent(where, engine_of, monkeypatch):
    requests = stream(random.randrange(2**32), 5)
    engine = engine_of(budget=1 << 21, config=CHUNKED, poison=True)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    for _ in range(5):
        engine.step()
    owner = {"launch": engine.runner, "wait": engine._launched.flight, "advance": engine.scheduler}[where]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    engine.strategy.check_integrity()
    assert not engine.strategy.residents
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)


def test_a_callback_that_raises_leaves_the_others_running(engine_of):
    requests = stream(random.randrange(2**32), 5)
    engine = engine_of(budget=1 << 21, config=CHUNKED)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]

    def raises(output):
        if output.finished:
            raise ValueError("callback")

    raised = 0
    while engine.has_work:
        try:
            engine.run(raises)
        except ValueError:
            raised += 1
    assert raised > 0
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)


def test_unchanged_rows_are_not_sent_again():
    engine = with_graphs(make_engine(overlap=True, budget=1 << 21))
    for _ in range(4):
        engine.add_request([3] * 5, SamplingParams(max_tokens=12))
    sent = []
    put_rows = engine.runner.inputs.put_rows
    engine.runner.inputs.put_rows = lambda changed, entries: (sent.append(list(changed)), put_rows(changed, entries))
    entry = engine.runner.layout.attention.tokens_per_entry
    engine.run()
    grows = sum(p % entry == 0 for p in range(5, 17))
    assert len(sent) <= 2 + grows, sent


def test_more_running_requests_than_rows_are_impossible():
    """The rows are bounded by what the budget holds, whatever the cap on running requests is."""
    strategy = make_strategy("shared_pool", 1 << 16)
    config = SchedulerConfig(max_running=10_000)
    engine = Engine(PoolModel(), strategy, config, make_backend("torch", "cpu"), overlap=True)
    assert engine.runner.max_rows < 100
    requests = [([token], SamplingParams(max_tokens=2)) for token in range(101)] * 2
    seqs = [engine.add_request(*request) for request in requests]
    engine.run()
    assert all(seq.finish_reason == "length" for seq in seqs)


def test_the_largest_steps_run_on_padding_before_the_first_request():
    """One row, and as many as there can be, of all the tokens of a step, once more with room for checkpoints; none counts as
    launched."""
    engine = with_graphs(
        make_engine(poison=True)
    )  # all bytes are alike, so that a copy between free blocks changes none
    runner, seen = engine.runner, []
    forward = runner._forward
    runner._forward = lambda batch: seen.append(batch) or forward(batch)
    before = runner.pool.buffer.clone()
    engine.backend.launches["kept[torch]"] = 3
    runner.prepare()
    largest = [batch for batch in seen if batch.num_tokens == runner.max_tokens]
    rows = [batch.num_rows for batch in largest]
    assert sorted(rows[:2]) == [1, runner.max_rows]
    assert [batch.checkpoint_interval for batch in largest] == [0, 64, 64]  # the last two are one batch
    for batch in largest:
        assert batch.num_tokens == runner.max_tokens == int(batch.prefill_cu_seqlens[-1])
        assert int(batch.context_len_B.sum()) == batch.num_tokens
        assert batch.row_T.bincount().tolist() == batch.context_len_B.tolist()
        assert int(batch.context_len_B.max()) == batch.max_prefill_len
    assert engine.backend.launches == {"kept[torch]": 3}
    assert torch.equal(runner.pool.buffer, before)


def test_no_second_counts_for_two_overlapping_steps():
    """Each look at the clock takes a second. A step runs from its launch or the end of the one before, whichever was later."""
    time = {"now": 0.0}

    def clock() -> float:
        time["now"] += 1.0
        return time["now"]

    class Durations(Recorder):
        seen: ClassVar[list[float]] = []

        def add(self, observed, duration_s):
            self.seen.append(duration_s)
            super().add(observed, duration_s)

    engine = make_engine(budget=1 << 21, config=CHUNKED, overlap=True, recorder=Durations({}), clock=clock)
    for prompt, params in stream(4, 5):
        engine.add_request(prompt, params)
    duration = engine.run()
    assert min(Durations.seen) > 0
    assert 0.8 * duration < sum(Durations.seen) <= duration


def test_tokens_after_the_end_are_told_to_nobody():
    """A stop token is found a step late; the token that was sampled meanwhile is no part of the output, nor of the stream."""
    requests = [([token] * 5, SamplingParams(max_tokens=20)) for token in (3, 4)]
    alone = run_one_by_one(requests)
    stop = next(token for i, token in enumerate(alone[0]) if 2 < i < 15 and token not in alone[0][:i])
    engine = make_engine(budget=1 << 22, overlap=True)
    first = engine.add_request(requests[0][0], SamplingParams(max_tokens=20, stop_token_ids=(stop,)))
    second = engine.add_request(*requests[1])
    told: dict[int, list[int]] = {first.seq_id: [], second.seq_id: []}
    while engine.has_work:
        for seq_id, token in engine.step().new_tokens.items():
            told[seq_id].append(token)
    assert first.output_ids == alone[0][: alone[0].index(stop) + 1]
    assert list(told.values()) == [first.output_ids, second.output_ids] == [first.output_ids, alone[1]]
