"""Engine: tokens do not depend on strategy, batching, chunking, placement, preemption or failures."""

import random
from itertools import cycle

import pytest
from pool_model import PoolModel, pool_spec, smallest_budget

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.sequence import Status
from hybridcache.errors import UserError
from hybridcache.kernels.backend import make_backend
from hybridcache.observe.metrics import Recorder
from hybridcache.strategies import build

SPEC = pool_spec()
PHYSICAL = {
    "shared_pool": ("shared_pool", {"placement_seed": 3}),
    "shared_pool_carve": ("shared_pool", {"mode": "carve", "placement_seed": 4}),
    "large_block": ("large_block", {}),
    "padded_page": ("padded_page", {"placement_seed": 5}),
    "static_split": ("static_split", {}),
    "two_ended": ("two_ended", {"page_size": 16}),
}
PROMPTS = [40, 1, 65, 30, 2, 64, 100, 33]
OUTPUTS = [27, 38, 37, 24, 31, 39, 35, 40, 38, 22]
CHUNKED = SchedulerConfig(max_tokens_per_step=96, max_running=6)


def make_strategy(label: str, budget: int):
    name, options = PHYSICAL[label]
    return build(name, spec=SPEC, budget_bytes=budget, physical=True, **options)


def make_engine(label: str = "shared_pool", budget: int = 1 << 20, config: SchedulerConfig | None = None, **options):
    model = options.pop("model", None) or PoolModel()
    return Engine(model, make_strategy(label, budget), config, make_backend("torch", "cpu"), **options)


def stream(seed: int, count: int = 10) -> list[tuple[list[int], SamplingParams]]:
    """Random tokens; fixed lengths, so that a tight pool preempts in every run."""
    rng = random.Random(seed)
    requests = []
    for i, length, output in zip(range(count), cycle(PROMPTS), cycle(OUTPUTS)):
        prompt = [rng.randrange(101) for _ in range(length)]
        params = SamplingParams(
            max_tokens=output,
            temperature=0.0 if i % 2 == 0 else 0.8,
            top_k=0 if i % 4 else 20,
            seed=None if i % 3 else rng.randrange(1000),
        )
        requests.append((prompt, params))
    return requests


def tight(label: str, requests, factor: float = 1.5) -> int:
    """A budget of ``factor`` times what the longest request needs."""
    longest = max(len(prompt) + params.max_tokens for prompt, params in requests)
    return int(factor * smallest_budget(lambda budget: make_strategy(label, budget), longest))


def run_all(engine: Engine, requests) -> list[list[int]]:
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    engine.run()
    engine.strategy.check_integrity()
    assert not engine.strategy.residents
    assert all(seq.status is Status.FINISHED for seq in seqs)
    return [seq.output_ids for seq in seqs]


def run_one_by_one(requests, **options) -> list[list[int]]:
    """The reference: an engine with plenty of memory and one request at a time."""
    engine = make_engine(budget=1 << 22, **options)
    found = []
    for prompt, params in requests:
        seq = engine.add_request(prompt, params)
        engine.run()
        found.append(seq.output_ids)
    return found


@pytest.fixture(scope="module")
def some_stream():
    """``(requests, their tokens run alone, seed)``; another stream in every test run."""
    seed = random.randrange(2**32)
    requests = stream(seed)
    return requests, run_one_by_one(requests), seed


@pytest.mark.parametrize("label", PHYSICAL)
def test_tokens_equal_those_of_requests_run_alone(label, some_stream):
    requests, expected, seed = some_stream
    engine = make_engine(label, tight(label, requests), CHUNKED, poison=True)
    assert run_all(engine, requests) == expected, f"seed {seed}"
    assert engine.scheduler.num_preemptions > 0, f"seed {seed}: the budget was not tight"
    assert any(shape.decode and shape.prefill for shape in engine.runner.model.batches), "no mixed step"


@pytest.mark.parametrize("victim", ["last", "least_computed"])
@pytest.mark.parametrize("admission", ["whole_prompt", "chunk"])
def test_policies_do_not_change_tokens(victim, admission, some_stream):
    requests, expected, seed = some_stream
    config = SchedulerConfig(max_tokens_per_step=64, victim=victim, admission=admission)
    engine = make_engine("shared_pool", tight("shared_pool", requests), config, poison=True)
    assert run_all(engine, requests) == expected, f"seed {seed}"
    assert engine.scheduler.num_preemptions > 0, f"seed {seed}"


def test_a_live_block_that_is_overwritten_changes_the_output():
    prompt, params = list(range(80)), SamplingParams(max_tokens=6)
    for kind_bytes, poisoned in ((0x00, False), (0xFF, True)):
        engine = make_engine()
        seq = engine.add_request(prompt, params)
        engine.step()
        span = random.choice([*engine.strategy.spans()][: len(SPEC.state_layers)])  # a state: all of it is read
        engine.runner.pool.buffer[span.offset : span.offset + span.num_bytes] = kind_bytes
        engine.run()
        if poisoned:
            assert seq.finish_reason == "error"
            assert "not finite" in engine.error(seq.seq_id)
            assert len(seq.output_ids) == 1
        else:
            assert seq.output_ids != run_one_by_one([(prompt, params)])[0]
        assert not engine.strategy.residents


def test_logits_that_are_not_finite_end_their_request_only():
    engine = make_engine()
    bad_one = engine.add_request([5] * 20, SamplingParams(max_tokens=5))
    good = engine.add_request([6] * 20, SamplingParams(max_tokens=5))
    engine.step()
    engine.runner.poison(bad_one.seq_id)
    output = engine.step()
    assert output.finished == [bad_one]
    assert list(output.new_tokens) == [good.seq_id]
    engine.run()
    assert good.output_ids == run_one_by_one([([6] * 20, SamplingParams(max_tokens=5))])[0]
    assert engine.failed_steps == 0


def test_a_step_that_failed_once_is_recomputed():
    requests = stream(1, 6)
    calls = {"count": 0}

    def fail_in_the_fifth(batch):
        calls["count"] += 1
        if calls["count"] == 5:
            raise RuntimeError("a kernel failed")

    engine = make_engine(budget=1 << 21, config=CHUNKED, model=PoolModel(before_forward=fail_in_the_fifth), poison=True)
    assert run_all(engine, requests) == run_one_by_one(requests)
    assert engine.failed_steps == 1
    assert all(seq.finish_reason == "length" for seq in engine.sequences)
    assert sum(seq.recomputed_after_failure for seq in engine.sequences) > 0
    assert sum(seq.recomputed_tokens for seq in engine.sequences) == 0
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("max_retries", [0, 2])
def test_a_request_that_keeps_failing_ends_and_the_others_finish(max_retries):
    requests = [([token] * 30, SamplingParams(max_tokens=8)) for token in range(5)]

    def fail_on_three(batch):
        # Request 3 fails once it has four output tokens, however they come to be computed.
        for row in range(batch.num_rows):
            if int(batch.context_len_B[row]) >= 34 and int(batch.state_write_BL[row, 0]) == state_of_three():
                raise ValueError("request 3 is cursed")

    engine = make_engine(model=PoolModel(before_forward=fail_on_three), max_retries=max_retries, poison=True)

    def state_of_three() -> int:
        if 3 not in engine.strategy.residents:
            return -1
        return int(engine.strategy.tables([3]).state_write[0, 0])

    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    engine.run()
    expected = run_one_by_one(requests)
    assert [seq.finish_reason for seq in seqs] == ["length", "length", "length", "error", "length"]
    assert engine.error(3) == "ValueError: request 3 is cursed"
    assert [seq.output_ids for seq in seqs if seq.seq_id != 3] == [expected[i] for i in (0, 1, 2, 4)]
    assert seqs[3].output_ids == expected[3][:4]
    assert engine.failed_steps == 1 + 1 + max_retries  # together, then alone until it ends
    assert not engine.strategy.residents


def test_requests_that_fail_only_together_finish_alone():
    requests = [([token] * 30, SamplingParams(max_tokens=8)) for token in range(4)]

    def fail_in_company(batch):
        if batch.num_rows > 1:
            raise MemoryError("too many rows")

    engine = make_engine(model=PoolModel(before_forward=fail_in_company))
    assert run_all(engine, requests) == run_one_by_one(requests)
    assert engine.failed_steps == 2


def test_moves_are_executed_before_the_tables_are_read():
    """Three requests; the first ends and leaves a hole, and the others grow beyond what is free without it."""
    lengths = [2, 60, 60]
    requests = [([token] * 16, SamplingParams(max_tokens=n)) for token, n in enumerate(lengths)]
    one = make_strategy("two_ended", 1 << 20)
    pages = sum(-(-(16 + n) // one.page_size) for n in lengths[1:])
    engine = make_engine("two_ended", 3 * one.slot_bytes + (pages - 1) * one.page_bytes, poison=True)
    assert run_all(engine, requests) == run_one_by_one(requests)
    assert engine.strategy.bytes_moved > 0
    assert engine.backend.launches["block_copy[torch]"] > 0


def test_pages_that_moved_are_read_where_they_are():
    """The first request leaves 3 pages of 16 tokens behind it; the slot of the fourth closes the gap, so that the second one's
    pages, beyond the holes, move into them while it decodes."""
    requests = [([token] * n, SamplingParams(max_tokens=out)) for token, (n, out) in enumerate([(47, 2), (16, 60)])]
    later = [([token] * 16, SamplingParams(max_tokens=12)) for token in (5, 6)]
    one = make_strategy("two_ended", 1 << 20)
    budget = 2 * one.slot_bytes + 5 * one.page_bytes + 1000
    engine = make_engine("two_ended", budget, poison=True)
    seqs = [engine.add_request(*request) for request in requests]
    while seqs[0].status is not Status.FINISHED:
        engine.step()
    engine.step()  # the second request is in the row that it keeps
    before = engine.strategy.kv_table(1).tolist()
    seqs += [engine.add_request(*request) for request in later]
    engine.step()
    assert engine.strategy.bytes_moved > 0
    assert engine.strategy.kv_table(1).tolist()[: len(before)] != before
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one([*requests, *later])


def test_moves_that_fail_recompute_everything_running(monkeypatch):
    requests = stream(2, 4)
    engine = make_engine(budget=1 << 21)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    for _ in range(3):
        engine.step()
    running = len(engine.scheduler.running)
    assert running > 0
    calls = iter([RuntimeError("copy failed")])

    def relocate():
        for error in calls:
            raise error

    monkeypatch.setattr(engine.runner, "relocate", relocate)
    assert engine.step().new_tokens == {}
    assert not engine.strategy.residents
    engine.run()
    assert [seq.output_ids for seq in seqs] == run_one_by_one(requests)

    def always():
        raise RuntimeError("copy failed")

    monkeypatch.setattr(engine.runner, "relocate", always)
    engine.add_request([1], SamplingParams(max_tokens=2))
    with pytest.raises(RuntimeError, match="copy failed"):
        engine.run()


def test_abort_wherever_a_request_stands():
    engine = make_engine(config=SchedulerConfig(max_running=2))
    requests = [([token] * 70, SamplingParams(max_tokens=6)) for token in range(4)]
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    engine.step()
    engine.abort(0)  # running
    engine.abort(3)  # waiting
    assert list(engine.strategy.residents) == [1]
    engine.run()
    expected = run_one_by_one(requests)
    assert [seq.finish_reason for seq in seqs] == ["abort", "length", "length", "abort"]
    assert [seqs[1].output_ids, seqs[2].output_ids] == expected[1:3]
    engine.abort(1)
    assert seqs[1].finish_reason == "length"
    with pytest.raises(UserError, match="seq_id=99"):
        engine.abort(99)
    assert not engine.strategy.residents


def test_stop_tokens_and_end_of_sequence():
    prompt = [7, 8, 9]
    full = run_one_by_one([(prompt, SamplingParams(max_tokens=30))])[0]
    assert len(set(full)) > 5
    first = {token: full.index(token) for token in full}
    stop, eos = full[4], full[2]

    def output(params: SamplingParams) -> tuple[list[int], str]:
        engine = make_engine(eos_token_ids=[eos])
        seq = engine.add_request(prompt, params)
        engine.run()
        return seq.output_ids, seq.finish_reason

    ended = output(SamplingParams(max_tokens=30))
    assert ended == (full[: first[eos] + 1], "stop")
    ignored = output(SamplingParams(max_tokens=30, ignore_eos=True))
    assert ignored == (full, "length")
    stopped = output(SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))
    assert stopped == (full[: first[stop] + 1], "stop")


def test_steps_stream_the_tokens():
    requests = stream(3, 5)
    engine = make_engine(config=CHUNKED, budget=1 << 21)
    seqs = [engine.add_request(prompt, params) for prompt, params in requests]
    streamed: dict[int, list[int]] = {seq.seq_id: [] for seq in seqs}
    finished = []

    def collect(output):
        for seq_id, token in output.new_tokens.items():
            streamed[seq_id].append(token)
        finished.extend(output.finished)

    engine.run(collect)
    assert streamed == {seq.seq_id: seq.output_ids for seq in seqs}
    assert sorted(seq.seq_id for seq in finished) == list(range(5))
    assert engine.sequences == seqs
    engine.forget(0)
    assert engine.sequences == seqs[1:]


def test_recording_is_off_the_clock():
    """Each look at the clock takes a second; recording takes 1000."""
    time = {"now": 0.0}

    def clock() -> float:
        time["now"] += 1.0
        return time["now"]

    class Slow(Recorder):
        def observe(self, *args):
            time["now"] += 1000.0
            return super().observe(*args)

        def add(self, *args):
            super().add(*args)
            time["now"] += 1000.0

    events: list[dict] = []

    class Sink:
        def write(self, event):
            events.append(event)

    recorder = Slow({"strategy": "shared_pool"}, Sink())
    engine = make_engine(config=CHUNKED, budget=1 << 21, recorder=recorder, clock=clock)
    for prompt, params in stream(4, 5):
        engine.add_request(prompt, params)
    duration = engine.run()
    row = recorder.finish(engine.sequences, engine.strategy)
    assert row["steps"] == recorder.steps == len(engine.runner.model.batches)
    assert duration < 20 * row["steps"]
    assert row["requests_served"] == 5
    assert row["output_tokens"] == sum(len(seq.output_ids) for seq in engine.sequences)
    assert 0 < row["utilization_mean"] < 1
    assert row["residents_peak"] > 1
    assert row["tokens_sha256"] is not None
    assert 0 < row["ttft_p50_s"] < 20 * row["steps"]
    samples = [event for event in events if event["event"] == "sample"]
    assert [event["time_s"] for event in samples] == sorted(event["time_s"] for event in samples)
    assert sum(event["event"] == "request" for event in events) == 5


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "prompt_ids="),
        ([[1, 2]], "prompt_ids="),
        ([[1, 2], [3]], "prompt_ids="),
        ([0.5], "prompt_ids='float64 values'"),
        (["a"], "prompt_ids="),
        ([1, 2, 101], r"prompt_ids\[2\]=101: outside the model's vocabulary of 101 ids"),
        ([-1], r"prompt_ids\[0\]=-1"),
        ([1] * 100_000, "holds at most"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(prompt, match):
    engine = make_engine()
    with pytest.raises(UserError, match=match):
        engine.add_request(prompt)
    assert engine.sequences == []
    assert not engine.has_work


def test_options_are_validated():
    for options, match in (({"max_retries": -1}, "max_retries="), ({"seed": -1}, "seed=")):
        with pytest.raises(UserError, match=match):
            make_engine(**options)
    engine = make_engine()
    engine.add_request([1])
    with pytest.raises(UserError, match="has not finished"):
        engine.forget(0)
