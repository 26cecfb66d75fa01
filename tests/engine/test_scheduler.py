"""Scheduler: policies, chunk cutting, preemption, and random streams that end with nothing leaked."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_model import pool_spec, smallest_budget

from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import Step
from hybridcache.errors import UserError
from hybridcache.strategies import build

SPEC = pool_spec()
NAMES = ("shared_pool", "large_block", "padded_page", "static_split", "two_ended", "lcm_carve", "byte_exact")


def scheduler_for(tokens: int, factor: float = 1.0, name: str = "shared_pool", hook=None, **config) -> Scheduler:
    """A scheduler whose pool holds one request of ``tokens`` tokens, times ``factor``."""
    budget = int(factor * smallest_budget(lambda b: build(name, spec=SPEC, budget_bytes=b), tokens))
    strategy = build(name, spec=SPEC, budget_bytes=budget)
    return Scheduler(strategy, SchedulerConfig(**config), before_release=hook)


def submit(scheduler: Scheduler, *shapes: tuple[int, int]) -> list[Sequence]:
    seqs = [Sequence(i, prompt, output) for i, (prompt, output) in enumerate(shapes)]
    for seq in seqs:
        scheduler.submit(seq)
    return seqs


def shape(step: Step) -> list[tuple[int, int, int]]:
    return [(item.seq.seq_id, item.start, item.num_tokens) for item in step.items]


@dataclass
class Clock:
    """Runs steps without a model; checks what must hold of every step."""

    scheduler: Scheduler
    now: float = 0.0
    finished: list[Sequence] = field(default_factory=list)

    def step(self, stopped=()) -> Step:
        scheduler, config = self.scheduler, self.scheduler.config
        known = {seq: seq.num_known for seq in scheduler.running}
        step = scheduler.schedule()
        self.now += 1.0
        assert step.items
        assert step.num_tokens <= config.max_tokens_per_step
        assert len(scheduler.running) <= config.max_running
        assert len({item.seq.seq_id for item in step.items}) == len(step.items)
        decode = [item.is_decode for item in step.items]
        assert decode == sorted(decode, reverse=True), "decodes first"
        assert step.num_decode == sum(decode)
        for item in step.items:
            seq = item.seq
            assert seq.status is Status.RUNNING
            assert item.start == seq.num_computed
            assert item.num_tokens > 0
            assert item.end == seq.num_known or item.end % config.chunk_multiple == 0, "cut inside a chunk"
            assert scheduler.strategy.num_tokens(seq.seq_id) == item.end
            assert known.get(seq, seq.num_known) == seq.num_known
        for seq in step.preempted:
            assert seq.status is Status.WAITING
            assert seq.num_computed == 0
            assert seq.seq_id not in scheduler.strategy.residents
        assert set(scheduler.strategy.residents) == {seq.seq_id for seq in scheduler.running}
        self.finished += scheduler.complete(step, self.now, stopped)
        return step


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_steps_scheduled_again_are_those_scheduled_anew(name, seed):
    """Late arrivals, aborts, stops and preemptions; steps that are counted late, twice scheduled, or never."""
    rng = random.Random(seed)
    shapes = [(rng.randint(1, 200), rng.randint(1, 80)) for _ in range(rng.randint(3, 14))]
    config = {"max_running": rng.randint(2, 9), "max_tokens_per_step": rng.choice((64, 256, 8192))}
    longest = max(prompt + output for prompt, output in shapes)
    factor = rng.uniform(1.2, 4.0)
    both = [scheduler_for(longest, factor, name, **config) for _ in range(2)]
    both[1]._schedule_again = lambda: None
    streams = [[Sequence(i, prompt, output) for i, (prompt, output) in enumerate(shapes)] for _ in both]
    arriving, again, steps = list(range(len(shapes))), 0, 0
    while arriving or both[0].has_work:
        if arriving and (rng.random() < 0.1 or not both[0].has_work):
            i = arriving.pop(0)
            for scheduler, seqs in zip(both, streams):
                scheduler.submit(seqs[i])
        aborted = rng.randrange(len(shapes)) if rng.random() < 0.01 else None
        stopped = {rng.randrange(len(shapes))} if rng.random() < 0.02 else set()
        twice, failing = rng.random() < 0.03, rng.random() < 0.01
        seen = []
        for scheduler, seqs in zip(both, streams):
            if aborted is not None and aborted not in arriving:
                scheduler.abort(seqs[aborted], steps)
            if not scheduler.has_work:
                seen.append(None)
                continue
            step = scheduler.schedule()
            if twice:
                step = scheduler.schedule()
            again += scheduler is both[0] and scheduler.runs_again(step)
            seen.append((shape(step), step.num_decode, [seq.seq_id for seq in step.preempted]))
            if failing:
                scheduler.requeue([item.seq for item in step.items])
            else:
                seen[-1] += ([seq.seq_id for seq in scheduler.complete(step, steps, stopped)],)
            scheduler.strategy.check_integrity()
        assert seen[0] == seen[1]
        state = [[(s.status, s.num_computed, s.num_output, s.num_settled) for s in seqs] for seqs in streams]
        assert state[0] == state[1]
        assert both[0].strategy.usage() == both[1].strategy.usage()
        steps += 1
    assert again or max(output for _, output in shapes) < 9


def test_decodes_come_first_and_prompts_share_the_rest():
    scheduler = scheduler_for(2000, max_tokens_per_step=128)
    submit(scheduler, (40, 5), (300, 5), (10, 5))
    clock = Clock(scheduler)
    # 88 tokens are left for the second prompt, which is cut at 64; the third waits for its turn only by budget.
    assert shape(clock.step()) == [(0, 0, 40), (1, 0, 64), (2, 0, 10)]
    # Two decodes, then (126 + 64) floored to a multiple of 64.
    assert shape(clock.step()) == [(0, 40, 1), (2, 10, 1), (1, 64, 64)]
    assert shape(clock.step()) == [(0, 41, 1), (2, 11, 1), (1, 128, 64)]
    assert shape(clock.step()) == [(0, 42, 1), (2, 12, 1), (1, 192, 108)]
    assert shape(clock.step()) == [(0, 43, 1), (1, 300, 1), (2, 13, 1)]
    assert [seq.seq_id for seq in clock.finished] == [0, 2]


def test_the_last_token_is_never_stored():
    scheduler = scheduler_for(64, max_tokens_per_step=64)
    (seq,) = submit(scheduler, (10, 4))
    clock = Clock(scheduler)
    for stored in (10, 11, 12, 13):
        assert shape(clock.step())[0][1:] == (stored - 1 if stored > 10 else 0, 1 if stored > 10 else 10)
        assert seq.num_computed == stored
    assert seq.status is Status.FINISHED
    assert seq.num_output == 4
    assert seq.max_stored_tokens == 13
    assert (seq.first_token_s, seq.finish_s, seq.finish_reason) == (1.0, 4.0, "length")
    assert (seq.ttft_s, seq.tpot_s) == (1.0, 1.0)


def test_a_stopped_request_ends_at_once():
    scheduler = scheduler_for(200)
    seqs = submit(scheduler, (10, 20), (10, 20))
    clock = Clock(scheduler)
    clock.step()
    clock.step(stopped={1})
    assert clock.finished == [seqs[1]]
    assert (seqs[1].finish_reason, seqs[1].num_output) == ("stop", 2)
    assert list(scheduler.strategy.residents) == [0]


def test_waiting_requests_are_admitted_in_order():
    """The head of the queue is not overtaken by a smaller request behind it."""
    scheduler = scheduler_for(120)
    submit(scheduler, (60, 2), (100, 2), (1, 2))
    clock = Clock(scheduler)
    assert shape(clock.step()) == [(0, 0, 60)]
    assert shape(clock.step()) == [(0, 60, 1)]
    assert shape(clock.step())[0] == (1, 0, 100)


def test_max_running_caps_residents():
    scheduler = scheduler_for(2000, max_running=2)
    submit(scheduler, (10, 3), (10, 3), (10, 3))
    clock = Clock(scheduler)
    assert shape(clock.step()) == [(0, 0, 10), (1, 0, 10)]


@pytest.mark.parametrize(("admission", "admitted"), [("whole_prompt", [0]), ("chunk", [0, 1])])
def test_admission(admission, admitted):
    """The second prompt does not fit whole beside the first; its first chunk does."""
    one = scheduler_for(1).strategy.geometry
    blocks = one.request_blocks(64) + one.request_blocks(200) - 1
    strategy = build("shared_pool", spec=SPEC, budget_bytes=blocks * one.manager_block_bytes)
    scheduler = Scheduler(strategy, SchedulerConfig(max_tokens_per_step=128, admission=admission))
    submit(scheduler, (64, 2), (200, 1))
    assert [item.seq.seq_id for item in scheduler.schedule().items] == admitted


def test_the_watermark_stays_free_unless_nothing_runs():
    full = scheduler_for(300)
    submit(full, (100, 2), (100, 2))
    assert len(full.schedule().items) == 2
    careful = scheduler_for(300, watermark=0.5)
    first, second = submit(careful, (200, 2), (50, 2))
    step = careful.schedule()
    assert [item.seq for item in step.items] == [first]  # alone it may take more than half
    assert second.status is Status.WAITING
    assert list(careful.strategy.residents) == [0]
    careful.complete(step, 1.0)
    clock = Clock(careful)
    while careful.has_work:
        clock.step()
    assert second.finish_reason == "length"


def test_last_admitted_is_preempted_first_and_comes_back_first():
    scheduler = scheduler_for(120, 1.2)
    seqs = submit(scheduler, (30, 60), (30, 60), (30, 60))
    clock = Clock(scheduler)
    order = []
    while scheduler.has_work:
        step = clock.step()
        order += [(seq.seq_id, seq.num_preemptions) for seq in step.preempted]
        if step.preempted:
            assert not any(item.start == 0 for item in step.items), "admission in a step that preempts"
            # Whoever was admitted first is the last to lose its memory, and waits in front.
            waiting = [seq.seq_id for seq in scheduler.waiting]
            assert waiting == sorted(waiting)
    assert order
    assert order[0][0] == max(item for item, _ in order)
    assert seqs[0].num_preemptions == 0, "the oldest is never preempted"
    assert [seq.seq_id for seq in clock.finished] == [0, 1, 2]
    assert sum(seq.num_preemptions for seq in seqs) == scheduler.num_preemptions == len(order)
    assert all(seq.recomputed_tokens > 0 for seq in seqs if seq.num_preemptions)


def test_a_preempted_request_keeps_its_outputs_and_recomputes_them():
    scheduler = scheduler_for(100, 1.1)
    seqs = submit(scheduler, (30, 60), (20, 60))
    clock = Clock(scheduler)
    while not seqs[1].num_preemptions:
        clock.step()
    outputs = seqs[1].num_output
    assert outputs > 0
    assert seqs[1].num_known == 20 + outputs
    assert seqs[1].recomputed_tokens == 20 + outputs - 1
    while seqs[1].status is Status.WAITING:
        step = clock.step()
    assert (1, 0, 20 + outputs) in shape(step)
    while scheduler.has_work:
        clock.step()
    assert seqs[1].num_output == 60


def test_least_computed_is_preempted():
    scheduler = scheduler_for(150, 1.05, victim="least_computed", admission="chunk", max_tokens_per_step=64)
    seqs = submit(scheduler, (10, 60), (64, 60), (12, 60))
    clock = Clock(scheduler)
    while scheduler.has_work:
        before = {seq.seq_id: seq.num_computed for seq in scheduler.running}
        step = clock.step()
        for seq in step.preempted:
            left = [before[item.seq.seq_id] for item in step.items if item.seq.seq_id in before]
            assert all(before[seq.seq_id] <= computed for computed in left)
    assert scheduler.num_preemptions > 0
    assert all(seq.finish_reason == "length" for seq in seqs)


def test_abort_frees_memory_wherever_a_request_stands():
    scheduler = scheduler_for(500, max_running=2)
    seqs = submit(scheduler, (50, 9), (50, 9), (50, 9))
    clock = Clock(scheduler)
    clock.step()
    scheduler.abort(seqs[0], 5.0)
    scheduler.abort(seqs[2], 6.0, "error")
    assert (seqs[0].status, seqs[0].finish_s, seqs[0].finish_reason) == (Status.FINISHED, 5.0, "abort")
    assert (seqs[2].finish_s, seqs[2].finish_reason) == (6.0, "error")
    assert list(scheduler.strategy.residents) == [1]
    scheduler.abort(seqs[0], 9.0)
    assert seqs[0].finish_s == 5.0
    while scheduler.has_work:
        clock.step()
    assert clock.finished == [seqs[1]]


def test_requeued_requests_are_recomputed_in_order():
    scheduler = scheduler_for(500)
    seqs = submit(scheduler, (50, 9), (50, 9), (50, 9), (50, 9))
    clock = Clock(scheduler)
    clock.step()
    clock.step()
    scheduler.schedule()
    scheduler.requeue([seqs[3], seqs[1]])
    assert [seq.seq_id for seq in scheduler.waiting] == [1, 3]
    assert [seq.seq_id for seq in scheduler.running] == [0, 2]
    assert (seqs[1].num_preemptions, seqs[1].recomputed_tokens, seqs[1].num_output) == (0, 0, 2)
    assert seqs[1].recomputed_after_failure == 51
    while scheduler.has_work:
        clock.step()
    assert all(seq.num_output == 9 for seq in seqs)


def test_the_hook_sees_a_request_before_its_memory_goes():
    seen = []

    def hook(seq_id: int) -> None:
        assert seq_id in scheduler.strategy.residents
        seen.append(seq_id)

    scheduler = scheduler_for(100, 1.1, hook=hook)
    seqs = submit(scheduler, (30, 60), (20, 60), (20, 60))
    clock = Clock(scheduler)
    while scheduler.running or len(scheduler.waiting) > 1:
        clock.step()
    while scheduler.has_work:
        clock.step()
    assert len(seen) == len(seqs) + scheduler.num_preemptions
    assert scheduler.num_preemptions > 0


def test_requests_that_can_never_run_are_refused():
    scheduler = scheduler_for(100)
    limit = scheduler.strategy.request_limit()
    scheduler.submit(Sequence(0, limit, 1))
    for prompt, output, match in ((limit, 2, f"holds at most {limit}"), (0, 1, "prompt_len=0"), (1, 0, "max_tokens=0")):
        with pytest.raises(UserError, match=match):
            scheduler.submit(Sequence(1, prompt, output))
    Clock(scheduler).step()
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_running", 0),
        ("max_tokens_per_step", 0),
        ("max_tokens_per_step", 63),
        ("chunk_multiple", 0),
        ("admission", "hope"),
        ("victim", "first"),
        ("watermark", 1.0),
        ("watermark", -0.1),
    ],
)
def test_policies_are_validated(field, value):
    with pytest.raises(UserError, match=f"^{field}="):
        SchedulerConfig(**{field: value})


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_streams_end_with_nothing_leaked(name, seed):
    """Random policies, arrivals, aborts, stops and failed steps under a tight budget."""
    rng = random.Random(seed)
    longest = rng.choice([40, 150, 400])
    config = {
        "max_tokens_per_step": rng.choice([64, 100, 300]),
        "max_running": rng.choice([1, 3, 50]),
        "admission": rng.choice(["whole_prompt", "chunk"]),
        "victim": rng.choice(["last", "least_computed"]),
        "watermark": rng.choice([0.0, 0.2]),
    }
    released = []
    scheduler = scheduler_for(longest, rng.choice([1.0, 1.3, 2.5]), name, released.append, **config)
    strategy = scheduler.strategy
    empty = strategy.usage()
    arriving = [
        Sequence(i, prompt, rng.randint(1, max(1, min(60, longest - prompt + 1))))
        for i, prompt in enumerate(rng.randint(1, rng.choice([longest, longest // 4])) for _ in range(14))
    ]
    everyone = list(arriving)
    clock = Clock(scheduler)
    steps = aborts = 0
    # Every step gives the oldest request a chunk or a token, so the work bounds the steps, failures and all.
    bound = sum(2 * (seq.prompt_len // 64 + 2) + 2 * seq.max_tokens for seq in everyone) * 3
    while arriving or scheduler.has_work:
        while arriving and rng.random() < 0.5:
            scheduler.submit(arriving.pop())
        if not scheduler.has_work:
            continue
        if rng.random() < 0.04:
            victim = rng.choice([*scheduler.running, *scheduler.waiting])
            scheduler.abort(victim, clock.now)
            aborts += 1
            continue
        if rng.random() < 0.04 and steps < bound / 4:
            step = scheduler.schedule()
            scheduler.requeue([item.seq for item in step.items])
            assert not scheduler.strategy.residents or len(step.items) < len(everyone)
        else:
            clock.step(stopped={seq.seq_id for seq in scheduler.running if rng.random() < 0.01})
        strategy.check_integrity()
        steps += 1
        assert steps < bound, f"{name}, seed {seed}: no progress"
    assert not strategy.residents
    assert strategy.usage() == empty, f"{name}, seed {seed}"
    assert all(seq.status is Status.FINISHED for seq in everyone)
    assert sum(seq.finish_reason == "abort" for seq in everyone) == aborts
    for seq in everyone:
        if seq.finish_reason == "length":
            assert seq.num_output == seq.max_tokens
            assert seq.num_computed == seq.max_stored_tokens
    assert sum(seq.num_preemptions for seq in everyone) == scheduler.num_preemptions


def test_a_prompt_cut_to_one_token_is_not_taken_for_decoding():
    """Three requests decode while a prompt gets one token a step: it is computed to its end, and everybody finishes."""
    scheduler = scheduler_for(400, chunk_multiple=1, max_tokens_per_step=4)
    seqs = submit(scheduler, (1, 40), (1, 40), (1, 40), (30, 6))
    clock = Clock(scheduler)
    for _ in range(200):
        if scheduler.has_work:
            clock.step()
    assert [seq.finish_reason for seq in seqs] == ["length"] * 4
    assert seqs[3].num_computed == 30 + 6 - 1


@pytest.mark.parametrize("decoding", [1, 3, 64])
def test_prompts_do_not_wait_for_those_that_decode(decoding):
    """The token budget has no room for a chunk beside the decoding rows: prompts and decodes take turns."""
    scheduler = scheduler_for(20_000, max_tokens_per_step=64, chunk_multiple=64, max_running=100)
    seqs = submit(scheduler, *[(1, 300)] * decoding, (200, 3), (130, 2))
    clock = Clock(scheduler)
    steps = 0
    while any(seq.num_output == 0 for seq in seqs[decoding:]):
        clock.step()
        steps += 1
        assert steps < 60, [(seq.seq_id, seq.num_computed) for seq in seqs[decoding:]]
    assert min(seq.num_output for seq in seqs[:decoding]) > 2, "the others go on meanwhile"
    while scheduler.has_work:
        clock.step()
    assert all(seq.num_output == seq.max_tokens for seq in seqs)


def test_rows_beyond_the_token_budget_take_turns():
    """More requests decode than a step has tokens: all of them get on."""
    scheduler = scheduler_for(20_000, max_tokens_per_step=4, chunk_multiple=1, max_running=12)
    seqs = submit(scheduler, *[(1, 200)] * 12)
    clock = Clock(scheduler)
    for _ in range(150):
        clock.step()
    assert min(seq.num_output for seq in seqs) > 3, [seq.num_output for seq in seqs]


def test_of_equally_computed_requests_the_last_admitted_is_preempted():
    """Three requests of one length grow into a pool with room for two of them at their longest."""
    scheduler = scheduler_for(90, 2.0, victim="least_computed")
    seqs = submit(scheduler, (20, 70), (20, 70), (20, 70))
    clock = Clock(scheduler)
    while not scheduler.num_preemptions:
        step = clock.step()
    assert [seq.seq_id for seq in step.preempted] == [2]
    assert len({seq.num_computed for seq in seqs[:2]}) == 1


def test_the_tokens_of_a_preempted_request_go_to_the_others():
    """Blocks of 16 tokens, none free once request 0 has grown. Request 1 needs one: request 0, with the fewest computed tokens,
    gives up its memory and its 16 of the step's 24 tokens. 23 are left for request 2, which is cut at 48; 7 would not do."""
    blocks = {"kernel_block_tokens": 8, "kernel_blocks_per_manager_block": 2, "states_per_manager_block": 4}
    strategy = build("shared_pool", spec=SPEC, budget_bytes=13 * 3072, **blocks)
    config = SchedulerConfig(max_tokens_per_step=24, chunk_multiple=8, victim="least_computed")
    scheduler = Scheduler(strategy, config)
    for seq_id, (prompt, computed, outputs) in enumerate([(32, 16, 0), (48, 48, 1), (200, 32, 0)]):
        assert strategy.admit(seq_id, computed)
        seq = Sequence(seq_id, prompt, 9, status=Status.RUNNING, num_computed=computed, num_output=outputs)
        scheduler.running.append(seq)
    assert strategy.usage().free == 3072
    step = scheduler.schedule()
    assert [seq.seq_id for seq in step.preempted] == [0]
    assert shape(step) == [(1, 48, 1), (2, 32, 16)]


def test_who_lost_its_memory_is_not_admitted_in_the_same_step():
    """Requests of 48 and 160 tokens fill 17 blocks. The first needs one more; the first chunk of the second would fit again."""
    blocks = {"kernel_block_tokens": 8, "kernel_blocks_per_manager_block": 2, "states_per_manager_block": 4}
    strategy = build("shared_pool", spec=SPEC, budget_bytes=17 * 3072, **blocks)
    scheduler = Scheduler(strategy, SchedulerConfig(max_tokens_per_step=64, chunk_multiple=8, admission="chunk"))
    for seq_id, prompt in enumerate((48, 160)):
        assert strategy.admit(seq_id, prompt)
        seq = Sequence(seq_id, prompt, 9, status=Status.RUNNING, num_computed=prompt, num_output=1)
        scheduler.running.append(seq)
    assert strategy.usage().free == 0
    step = scheduler.schedule()
    assert [seq.seq_id for seq in step.preempted] == [1]
    assert shape(step) == [(0, 48, 1)]
    scheduler.complete(step, 1.0)
    assert shape(scheduler.schedule()) == [(0, 49, 1), (1, 0, 56)]


def test_tokens_on_their_way_are_forgotten_where_a_request_ends():
    scheduler = scheduler_for(200)
    stopped, aborted = submit(scheduler, (10, 20), (12, 20))
    sampled = scheduler.advance(scheduler.schedule())
    scheduler.advance(scheduler.schedule())
    assert (stopped.num_output, stopped.num_settled) == (2, 0)
    assert scheduler.settle(sampled, 1.0, stopped={0}) == [stopped]
    scheduler.abort(aborted, 1.0)
    for seq in (stopped, aborted):
        assert (seq.num_output, seq.num_settled, seq.num_computed) == (1, 1, seq.prompt_len + 1)


def repeating(*shapes: tuple[int, int]) -> tuple[Clock, list[Sequence]]:
    """Requests that have decoded so often that their step is the last one again. Blocks of 16 tokens; steps of 64."""
    scheduler = scheduler_for(400, max_tokens_per_step=64, chunk_multiple=8)
    seqs, clock = submit(scheduler, *shapes), Clock(scheduler)
    while clock.step().cohort is None:
        assert clock.now < 9, "no step is ever the last one again"
    return clock, seqs


def test_a_repeated_step_takes_memory_and_ends_with_its_shortest_request():
    clock, seqs = repeating((10, 40), (14, 60))
    while not clock.finished:
        step = clock.step()
        computed = [seq.num_computed for seq in seqs]
        assert shape(step) == [(0, computed[0] - 1, 1), (1, computed[1] - 1, 1)]
        clock.scheduler.strategy.check_integrity()
    assert [(seq.seq_id, seq.num_output) for seq in clock.finished] == [(0, 40)]
    assert seqs[1].num_output == 40
    assert shape(clock.step()) == [(1, 14 + 39, 1)]


def test_a_repeated_step_admits_within_the_token_budget():
    """62 tokens are left beside two that decode: a prompt of 100 is cut at 56."""
    clock, seqs = repeating((10, 40), (14, 60))
    late = Sequence(2, 100, 2)
    clock.scheduler.submit(late)
    at = [seq.num_computed for seq in seqs]
    assert shape(clock.step()) == [(0, at[0], 1), (1, at[1], 1), (2, 0, 56)]


def test_a_repeated_step_ends_where_one_leaves():
    clock, seqs = repeating((10, 40), (14, 60))
    clock.scheduler.abort(seqs[0], clock.now)
    at = seqs[1].num_computed
    assert shape(clock.step()) == [(1, at, 1)]


def test_a_repeated_step_counts_the_last_token_before_it_arrives():
    """With overlap tokens arrive late: a request that has its last one on the way returns its memory and does not run again."""
    clock, seqs = repeating((10, 40), (14, 60))
    scheduler = clock.scheduler
    while seqs[0].num_output < 40:
        scheduler.advance(scheduler.schedule())
    assert (seqs[0].status, seqs[1].status) == (Status.ENDING, Status.RUNNING)
    assert list(scheduler.strategy.residents) == [1]
