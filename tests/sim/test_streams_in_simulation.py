"""simulate on streams: what a request's end releases, tokens of sequences, and steps that are counted at once."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_agent_sessions import FORK, chain, trace
from test_sim import DEVICE, MIB, cost_model, outcome, strategy, stream

from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import Cohort, ScheduledTokens, Step
from hybridcache.errors import UserError
from hybridcache.sim import simulator
from hybridcache.sim.simulator import SimulatedSequence, SimulationResult, simulate
from hybridcache.strategies import STRATEGIES
from hybridcache.workloads import Request, Workload, build_workload
from hybridcache.workloads.base import LazyIds, UniqueIds


def conversations(**options: Any) -> Any:
    shape = {"num_conversations": 4, "first_tokens": 90, "rounds": 3, "output_tokens": 7, "new_tokens": 20}
    return build_workload("conversations", **{**shape, **options})


def test_a_round_starts_when_the_one_before_has_ended() -> None:
    one = conversations()
    result = simulate(one, strategy(), None, cost_model())
    assert [seq.seq_id for seq in result.sequences] == [*range(12)]
    rounds = [result.sequences[4 * i : 4 * i + 4] for i in range(3)]
    assert [{seq.prompt_len for seq in each} for each in rounds] == [{90}, {117}, {144}]
    for before, after in pairwise(rounds):
        assert {seq.arrival_s for seq in after} == {max(seq.finish_s for seq in before)}
    assert result.duration_s == max(seq.finish_s for seq in rounds[-1])
    assert outcome(simulate(one, strategy(), None, cost_model())) == outcome(result), "a stream is run from its start"


def test_an_agent_thinks_after_its_request_has_ended(tmp_path: Path) -> None:
    path = trace(tmp_path, chain(100, 200, 300, think_s=25.0), FORK)
    one = build_workload("agent_sessions", path=path, live_sessions=1, num_sessions=2)
    seqs = simulate(one, strategy(budget=40 * MIB), None, cost_model()).sequences
    first, second = (next(r for r in seqs if r.prompt_len == n) for n in (100, 300))
    middle = seqs[seqs.index(first) + 1]
    assert middle.arrival_s == pytest.approx(first.finish_s + 25.0)
    assert second.arrival_s == pytest.approx(middle.finish_s + 25.0)
    assert len(seqs) == 9
    starts = [seq.arrival_s for seq in seqs if seq.prompt_len in (100,)] + [seqs[0].arrival_s]
    assert all(start >= 0 for start in starts)


def test_a_refused_request_ends_its_session_and_the_next_one_starts(tmp_path: Path) -> None:
    """The second request of the long session can never fit; the short one follows at that moment."""
    limit = strategy().request_limit()
    path = trace(tmp_path, chain(100, limit, limit + 64, think_s=3.0), chain(150))
    one = build_workload("agent_sessions", path=path, live_sessions=1, num_sessions=20, max_tokens=10 * limit)
    result = simulate(one, strategy(), None, cost_model())
    assert {request.prompt_tokens for request in result.refused_requests} == {limit}
    assert (result.refused, len(result.sequences)) == (10, 20)
    ends = {seq.seq_id: seq for seq in result.sequences}
    for request in result.refused_requests:
        assert request.arrival_s == pytest.approx(ends[request.request_id - 1].finish_s + 3.0)
        after = ends.get(request.request_id + 1)
        assert after is None or after.arrival_s == request.arrival_s


def test_tokens_are_prompt_and_output_while_a_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[int]] = {}
    times: list[tuple[float, float]] = []
    now = [0.0]
    original, complete = Scheduler.schedule, Scheduler.complete

    def schedule(self: Scheduler) -> Step:
        times.append((self.prefix.now_s, now[0]))
        step = original(self)
        for seq in step.seqs:
            assert isinstance(seq, SimulatedSequence)
            seen[seq.seq_id] = seq.tokens(0, seq.num_known).tolist()
            assert seq.tokens(2, 4).tolist() == seen[seq.seq_id][2:4]
        return step

    def completed(self: Scheduler, step: Step, now_s: float) -> list[Sequence]:
        now[0] = now_s
        return complete(self, step, now_s)

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    monkeypatch.setattr(Scheduler, "complete", completed)
    monkeypatch.setattr(simulator, "_skip", lambda scheduler, step, cost, now_s, until_s: (now_s, 0))
    lazy = LazyIds(4, lambda: np.array([5, 6, 7, 8], np.int32))
    requests = (
        Request(0, 0.0, 6, 3, (1, 2, 3, 4, 5, 6), (70, 80, 90)),
        Request(1, 0.0, 4, 3, lazy),
        Request(2, 0.0, 5, 4, np.arange(5, dtype=np.int32)),
    )
    result = simulate(Workload("w", "s", requests), strategy(), None, cost_model())
    assert seen[0] == [1, 2, 3, 4, 5, 6, 70, 80], "the last output token is never stored"
    assert seen[1][:4] == [5, 6, 7, 8]
    assert seen[2][:5] == [0, 1, 2, 3, 4]
    own = seen[1][4:] + seen[2][5:]
    assert len(own) == len(set(own)) == 5
    assert max(own) < 0, "outputs that the stream does not tell occur once"
    for seq in result.sequences:
        assert isinstance(seq, SimulatedSequence)
        assert seq.ids is None
        assert seq.request is None, "a long run does not hold the ids of all its requests"
    assert all(told == now_s for told, now_s in times), "the time is told before each step"
    assert times[-1][0] > 0


def test_a_stream_without_ids_has_no_tokens() -> None:
    seq = SimulatedSequence(3, 10, 2, request=Request(3, 0.0, 10, 2), unique=UniqueIds())
    with pytest.raises(UserError, match=r"prompt_ids=None: request 3 has no token ids"):
        seq.tokens(0, 1)


def random_stream(rng: random.Random, seed: int) -> Any:
    kind = rng.choice(["open", "together", "alone"])
    if kind != "open":
        return conversations(
            num_conversations=rng.randint(1, 30),
            first_tokens=rng.randint(1, 300),
            output_tokens=rng.randint(1, 150),
            new_tokens=rng.randint(1, 100),
            paced=kind,
            think_s=rng.choice([0.0, 3.0]),
            seed=seed,
        )
    return build_workload(
        "synthetic_chat",
        num_requests=rng.randint(20, 60),
        rate_per_s=rng.choice([None, 0.5, 5.0]),
        prompt_median=rng.randint(20, 300),
        output_median=rng.randint(1, 100),
        max_prompt=1000,
        max_output=400,
        seed=seed,
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_counting_steps_at_once_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with requests that wait, fall back and are refused."""
    seed = random.randrange(1 << 30)
    skipped, skip = [], simulator._skip

    def counted(*given: Any) -> tuple[float, int]:
        found = skip(*given)
        skipped.append(found[1])
        return found

    def run() -> tuple[SimulationResult, Any]:
        rng = random.Random(seed)
        one = random_stream(rng, seed)
        config = SchedulerConfig(
            max_running=rng.randint(1, 30),
            max_tokens_per_step=rng.choice([64, 256, 2048]),
            admission=rng.choice(["whole_prompt", "chunk"]),
            victim=rng.choice(["last", "least_computed"]),
            watermark=rng.choice([0.0, 0.1]),
        )
        pool = strategy(name, budget=rng.randint(4, 12) * MIB)
        result = simulate(one, pool, config, cost_model())
        pool.check_integrity()
        return result, pool.usage()

    for _ in range(5):
        monkeypatch.setattr(simulator, "_skip", counted)
        fast, memory = run()
        monkeypatch.setattr(simulator, "_skip", lambda scheduler, step, cost, now_s, until_s: (now_s, 0))
        slow, expected = run()
        assert outcome(fast) == outcome(slow), seed
        assert (fast.duration_s, fast.steps, fast.refused) == (slow.duration_s, slow.steps, slow.refused), seed
        assert memory == expected, seed
        seed += 1
    assert sum(skipped) > 0, seed


def test_most_steps_of_a_decode_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of 200 output tokens: prefill, two decodes that make a cohort, and a step for each new block and the end."""
    scheduled: list[Step] = []
    original = Scheduler.schedule
    monkeypatch.setattr(Scheduler, "schedule", lambda self: scheduled.append(original(self)) or scheduled[-1])
    result = simulate(stream((0.0, 5, 200)), strategy(), None, cost_model())
    assert result.steps == 200
    assert len(scheduled) < 20


def test_free_steps_of_a_cohort() -> None:
    """Room for 5 and 9 more tokens; 8 and 20 more to come: 5 steps, then none. Later 2 more would end the first request."""
    seqs = [Sequence(0, 10, 9, num_computed=10, num_output=1), Sequence(1, 30, 21, num_computed=30, num_output=1)]
    cohort = Cohort(seqs, {0: 15, 1: 39})
    assert cohort.free_steps == 5
    cohort.skip(5)
    assert [(seq.num_computed, seq.num_output, seq.num_settled) for seq in seqs] == [(15, 6, 5), (35, 6, 5)]
    assert cohort.totals.tolist() == [15, 35]
    assert (cohort.steps_left, cohort.free_steps) == (3, 0)
    cohort.room[:] = 100
    assert cohort.free_steps == 2, "in the last step a request ends"
    cohort.room[0] = 0
    assert cohort.free_steps == 0, "states that another owner holds, too"


def test_decodes_cost_what_their_terms_add_up_to() -> None:
    rows = [
        Sequence(i, 10 * i + 1, 9, num_computed=10 * i + 1, num_output=1, status=Status.RUNNING) for i in range(1, 5)
    ]
    items = [ScheduledTokens(seq, seq.num_computed, 1) for seq in rows]
    cohort = Cohort(rows, {seq.seq_id: 1000 for seq in rows})
    cohort.advance()
    for model in (cost_model(), cost_model(tp_size=2, collective_latency_s=0.5)):
        expected = sum(model.explain(Step(items), 3000).values())
        assert model.step_s(Step(cohort=cohort), 3000) == pytest.approx(expected)
        context = sum(item.end for item in items)
        several = model.decode_s(4, np.array([context, context + 4]))
        assert several[0] == model.step_s(Step(cohort=cohort))
        kv = model.spec.kv_bytes_per_token
        assert several[1] - several[0] == pytest.approx(4 * kv / (DEVICE.bandwidth * DEVICE.kv_efficiency))
