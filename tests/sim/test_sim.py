"""Simulation: what must hold whatever the strategy, and the cost model against numbers worked out by hand."""

import random
from dataclasses import replace
from typing import Any

import pytest

from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.sequence import Sequence
from hybridcache.engine.step import ScheduledTokens, Step
from hybridcache.errors import UserError
from hybridcache.observe.metrics import Recorder
from hybridcache.sim.cost_model import CostModel, DeviceSpec, ModelParameters, StepWork, least_ranks
from hybridcache.sim.simulator import SimulationResult, simulate
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import STRATEGIES, Strategy, build
from hybridcache.strategies.byte_exact import ByteExact
from hybridcache.workloads import Request, Workload, build_workload
from models.configs import shipped_fields

MIB = 1 << 20


def hybrid_spec(layers: int = 8, tp_size: int = 1) -> CacheSpec:
    """1 KiB of KV a token and layer, states of 66,304 B a layer."""
    attention = AttentionKV(num_kv_heads=2, k_dim=128, v_dim=128, dtype="bfloat16")
    state = RecurrentState((4, 64, 64), "float32", 128, 4, "bfloat16")
    kinds = [(attention, None) if i % 4 == 3 else (None, state) for i in range(layers)]
    return CacheSpec("test", tuple(LayerSpec(i, kv, st) for i, (kv, st) in enumerate(kinds)), tp_size)


SPEC = hybrid_spec()
PARAMETERS = ModelParameters(
    dense=1000,
    head=400,
    stored=10_000,
    num_experts=4,
    experts_per_token=2,
    expert=50,
    expert_layers=8,
    num_layers=8,
    hidden_size=16,
    num_query_heads=8,
)
DEVICE = DeviceSpec(
    name="round numbers",
    bandwidth=1e6,
    flops=1e9,
    dense_efficiency=0.5,
    dense_matmul_efficiency=0.4,
    expert_efficiency=0.25,
    expert_matmul_efficiency=0.1,
    kv_efficiency=0.8,
    prefill_attention_efficiency=0.5,
    state_efficiency=0.4,
    state_prefill_efficiency=0.2,
    step_overhead_s=0.125,
)


def cost_model(tp_size: int = 1, **changes: Any) -> CostModel:
    return CostModel(PARAMETERS, hybrid_spec(tp_size=tp_size), replace(DEVICE, **changes))


def strategy(name: str = "shared_pool", budget: int = 4 * MIB, **options: Any) -> Strategy:
    return build(name, spec=SPEC, budget_bytes=budget, **options)


def stream(*requests: tuple[float, int, int]) -> Workload:
    return Workload("w", "test", tuple(Request(i, at, p, o) for i, (at, p, o) in enumerate(requests)))


def outcome(result: SimulationResult) -> list[tuple[Any, ...]]:
    return [
        (s.seq_id, s.first_token_s, s.finish_s, s.num_output, s.num_preemptions, s.recomputed_tokens)
        for s in result.sequences
    ]


# -- simulate ------------------------------------------------------------------------------------------------------------


def random_run(name: str, seed: int) -> tuple[Workload, SimulationResult, Strategy, dict[str, Any]]:
    rng = random.Random(seed)
    workload = build_workload(
        "synthetic_chat",
        num_requests=rng.randint(20, 60),
        rate_per_s=rng.choice([None, 0.5, 5.0]),
        prompt_median=rng.randint(20, 300),
        output_median=rng.randint(1, 60),
        max_prompt=1000,
        max_output=200,
        seed=seed,
    )
    config = SchedulerConfig(
        max_running=rng.randint(1, 30),
        max_tokens_per_step=rng.choice([64, 256, 2048]),
        admission=rng.choice(["whole_prompt", "chunk"]),
        victim=rng.choice(["last", "least_computed"]),
        watermark=rng.choice([0.0, 0.1]),
    )
    pool, recorder = strategy(name, budget=rng.randint(4, 12) * MIB), Recorder({})
    result = simulate(workload, pool, config, cost_model(), recorder)
    return workload, result, pool, recorder.finish(result.sequences, pool, result.refused_requests)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_request_gets_its_exact_output_or_is_refused(name: str) -> None:
    seed = random.randrange(1 << 30)
    workload, result, pool, row = random_run(name, seed)
    finished = {seq.seq_id: seq for seq in result.sequences}
    refused = {request.request_id for request in result.refused_requests}
    assert finished.keys() | refused == {request.request_id for request in workload.requests}, seed
    assert not finished.keys() & refused, seed
    assert result.refused == len(refused)
    for request in workload.requests:
        if request.request_id in refused:
            assert request.prompt_tokens + request.output_tokens - 1 > pool.request_limit(), seed
            continue
        seq = finished[request.request_id]
        assert seq.num_output == request.output_tokens, seed
        assert seq.num_computed == request.prompt_tokens + request.output_tokens - 1, seed
        assert seq.finish_reason == "length", seed
        assert request.arrival_s <= seq.first_token_s <= seq.finish_s <= result.duration_s, seed
    assert row["output_tokens"] == sum(seq.num_output for seq in result.sequences)
    assert row["steps"] == result.steps
    assert row["residents_peak"] >= 1
    pool.check_integrity()
    assert pool.usage().residents == 0
    assert pool.usage().held == 0


@pytest.mark.parametrize("name", ["shared_pool", "two_ended"])
def test_the_same_input_gives_the_same_run(name: str) -> None:
    seed = random.randrange(1 << 30)
    _, one, _, row_one = random_run(name, seed)
    _, two, _, row_two = random_run(name, seed)
    assert outcome(one) == outcome(two), seed
    assert (one.duration_s, one.steps) == (two.duration_s, two.steps), seed
    assert str(row_one) == str(row_two), seed


def test_the_bound_holds_at_least_as_many_residents_and_wastes_nothing() -> None:
    workload = stream(*[(0.0, 40, 30)] * 60)
    rows = {}
    for name in STRATEGIES:
        pool, recorder = strategy(name, budget=8 * MIB), Recorder({})
        result = simulate(workload, pool, SchedulerConfig(), cost_model(), recorder)
        assert result.refused == 0, name
        rows[name] = recorder.finish(result.sequences, pool, result.refused_requests)
    bound = rows["byte_exact"]
    assert bound["useful_bytes_mean"] == bound["held_bytes_mean"]
    for name, row in rows.items():
        assert row["residents_peak"] <= bound["residents_peak"], name
        assert row["held_bytes_mean"] >= row["useful_bytes_mean"], name
    assert rows["static_split"]["residents_peak"] < bound["residents_peak"]


def test_the_clock_jumps_over_idle_gaps() -> None:
    workload = stream((2.0, 5, 3), (1000.0, 5, 3))
    recorder = Recorder({})
    pool = strategy()
    result = simulate(workload, pool, None, cost_model(), recorder)
    first, second = result.sequences
    assert result.steps == 6
    assert first.finish_s < 10
    assert second.first_token_s - 1000.0 == pytest.approx(first.first_token_s - 2.0)
    assert result.duration_s == second.finish_s - 2.0, "counted from the first arrival"
    row = recorder.finish(result.sequences, pool, result.refused_requests)
    # Both requests run alone, so the means over steps are those of one resident, not diluted by the gap.
    assert SPEC.request_bytes(5) <= row["useful_bytes_mean"] <= SPEC.request_bytes(7)


def test_arrival_during_a_step_waits_for_its_end() -> None:
    model = cost_model()
    workload = stream((0.0, 5, 4), (0.01, 5, 1))
    result = simulate(workload, strategy(), None, model)
    prefill = model.step_s(Step([ScheduledTokens(Sequence(0, 5, 4), 0, 5)]))
    assert prefill > 0.01
    assert result.sequences[0].first_token_s == pytest.approx(prefill)
    assert result.sequences[1].first_token_s > prefill


def test_duration_counts_from_the_first_arrival() -> None:
    """The same stream, 100 s later, takes as long and yields tokens at the same rate."""
    early, late = (
        simulate(stream((at, 9, 7), (at + 0.5, 5, 3)), strategy(), None, cost_model()) for at in (0.0, 100.0)
    )
    assert early.duration_s == pytest.approx(max(seq.finish_s for seq in early.sequences))
    assert late.duration_s == pytest.approx(early.duration_s)
    nothing = simulate(stream((5.0, 10**9, 1)), strategy(), None, cost_model())
    assert (nothing.duration_s, nothing.refused) == (0.0, 1)


def test_a_stream_out_of_order_runs_by_arrival() -> None:
    result = simulate(stream((5.0, 4, 1), (0.0, 4, 1)), strategy(), None, cost_model())
    assert [seq.seq_id for seq in result.sequences] == [1, 0]
    assert result.sequences[0].first_token_s < 5.0 < result.sequences[1].first_token_s


def test_requests_that_can_never_fit_are_refused_and_told() -> None:
    pool = strategy()
    limit = pool.request_limit()
    workload = stream((0.0, 10, 2), (0.0, limit, 1), (0.0, limit, 2), (0.0, 10 * limit, 5))
    result = simulate(workload, pool, SchedulerConfig(), cost_model())
    assert [seq.seq_id for seq in result.sequences] == [0, 1]
    assert [request.request_id for request in result.refused_requests] == [2, 3]
    assert result.refused == 2


def test_preemption_recomputes_and_still_delivers() -> None:
    pool = strategy("byte_exact", budget=SPEC.request_bytes(100) * 2)
    result = simulate(stream((0.0, 60, 90), (0.0, 60, 90)), pool, SchedulerConfig(), cost_model())
    assert [seq.num_output for seq in result.sequences] == [90, 90]
    assert sum(seq.num_preemptions for seq in result.sequences) >= 1
    assert sum(seq.recomputed_tokens for seq in result.sequences) >= 60


class _Compacting(ByteExact):
    """byte_exact that claims to relocate 1,000 bytes at every growth."""

    def grow(self, seq_id: int, num_tokens: int) -> bool:
        self.bytes_moved += 1000
        return super().grow(seq_id, num_tokens)


def test_relocated_bytes_are_charged_once() -> None:
    workload = stream((0.0, 10, 5))
    plain = simulate(workload, strategy("byte_exact"), None, cost_model())
    moving = _Compacting(SPEC, 4 * MIB)
    moving.bytes_moved = 777  # from before the run: not charged
    charged = simulate(workload, moving, None, cost_model())
    # 4 decode steps grow by a token each; a move reads and writes.
    assert charged.duration_s - plain.duration_s == pytest.approx(4 * 2 * 1000 / DEVICE.bandwidth)


# -- cost model ------------------------------------------------------------------------------------------------------------


def mixed_step() -> Step:
    """Two decodes on 11 and 30 tokens, a prompt's head (0..63 of 100), and a prompt's tail (64..99 of 100)."""
    decodes = [Sequence(0, 5, 9, num_output=6), Sequence(1, 30, 9, num_output=1)]
    head, tail = Sequence(2, 100, 9), Sequence(3, 100, 9)
    return Step(
        [
            ScheduledTokens(decodes[0], 10, 1),
            ScheduledTokens(decodes[1], 30, 1),
            ScheduledTokens(head, 0, 64),
            ScheduledTokens(tail, 64, 36),
        ]
    )


def test_work_of_a_step() -> None:
    assert StepWork.of(mixed_step().items) == StepWork(
        tokens=102,
        sampled=3,
        decode_rows=2,
        decode_context=11 + 31,
        prefill_tokens=100,
        prefill_context=64 + 100,
        prefill_pairs=sum(range(1, 65)) + sum(range(65, 101)),
        states_read=1,
        states_written=2,
    )


def test_terms_by_hand() -> None:
    step = mixed_step()
    terms = cost_model().explain(step, bytes_moved=5000)
    # A token of KV: 2 attention layers x 2 heads x (128 + 128) x 2 B. A state: 4 x 64 x 64 x 4 B + 128 x 3 x 2 B, 6 layers.
    kv, state = 2048, 6 * (65_536 + 768)
    assert (SPEC.kv_bytes_per_token, SPEC.state_bytes) == (kv, state)
    # 6 Dk Dv + 2 x 64 (3 Dk + 2 Dv) per head and token.
    delta_rule = 6 * 4 * (6 * 64 * 64 + 128 * (3 * 64 + 2 * 64))
    assert terms == pytest.approx(
        {
            "dense": max(1000 * 2 / 0.5e6, 2 * 1000 * 102 / 0.4e9),
            "head": max(400 * 2 / 0.5e6, 2 * 400 * 3 / 0.4e9),
            # 102 tokens touch all 4 experts of all 8 layers.
            "experts": max(4 * 8 * 50 * 2 / 0.25e6, 2 * 102 * 2 * 8 * 50 / 0.1e9),
            "attention_decode": 42 * kv / 0.8e6,
            # 5,050 pairs, 8 query heads, 2 layers, 128 + 128 multiplications of a pair.
            "attention_prefill": max(164 * kv / 0.8e6, 5050 * 2 * 2 * 8 * 256 / 0.5e9),
            "state_decode": 2 * 2 * state / 0.4e6,
            "state_prefill": max(3 * state / 0.4e6, 100 * delta_rule / 0.2e9),
            "moves": 2 * 5000 / 1e6,
            "overhead": 0.125,
        }
    )
    assert cost_model().step_s(step, bytes_moved=5000) == pytest.approx(sum(terms.values()))


def test_compute_bound_terms_by_hand() -> None:
    terms = cost_model(flops=1e5).explain(mixed_step())
    assert terms["dense"] == pytest.approx(2 * 1000 * 102 / 0.4e5)
    assert terms["experts"] == pytest.approx(2 * 102 * 2 * 8 * 50 / 0.1e5)
    assert terms["attention_prefill"] == pytest.approx(5050 * 2 * 2 * 8 * 256 / 0.5e5)
    assert terms["state_prefill"] == pytest.approx(100 * 6 * 4 * (6 * 4096 + 128 * 320) / 0.2e5)
    assert terms["moves"] == 0


def test_a_step_that_samples_nothing_skips_the_head() -> None:
    step = Step([ScheduledTokens(Sequence(0, 100, 1), 0, 64)])
    assert cost_model().explain(step)["head"] == 0


def test_experts_touched() -> None:
    model = cost_model()
    assert model.experts_touched(0) == 0
    assert model.experts_touched(1) == pytest.approx(2)
    assert model.experts_touched(2) == pytest.approx(3)
    assert model.experts_touched(1000) == pytest.approx(4)
    dense = CostModel(replace(PARAMETERS, num_experts=0, experts_per_token=0, expert=0, expert_layers=0), SPEC, DEVICE)
    assert dense.experts_touched(7) == 0
    assert dense.explain(mixed_step())["experts"] == 0


def test_work_divides_by_ranks_and_costs_collectives() -> None:
    """The specs here are those of one rank: four ranks hold four times the cache, and read it at four times the rate."""
    one = cost_model().explain(mixed_step(), 4000)
    four = cost_model(tp_size=4, collective_latency_s=0.5, link_bandwidth=1e3).explain(mixed_step(), 4000)
    for term in ("dense", "head", "experts"):
        assert four[term] == pytest.approx(one[term] / 4), term
    for term in ("attention_decode", "state_decode", "moves", "overhead"):
        assert four[term] == pytest.approx(one[term]), term
    # Two all-reduces in each of 8 layers: a latency, and 2 x 3/4 of 102 x 16 elements of 2 B.
    assert four["collectives"] == pytest.approx(16 * (0.5 + 1.5 * 102 * 16 * 2 / 1e3))
    assert "collectives" not in one


@pytest.mark.parametrize(
    ("field", "value"),
    [("bandwidth", 0), ("bandwidth", float("nan")), ("flops", "fast"), ("kv_efficiency", 1.2), ("step_overhead_s", -1)],
)
def test_device_refuses(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{field}="):
        replace(DEVICE, **{field: value})


def test_a_rank_holds_its_weights_and_its_cache() -> None:
    """90 % of a device is for both: the least budget beyond what the weights leave is refused."""
    fields = shipped_fields("tiny")
    spec, device = CacheSpec.from_config(fields), DeviceSpec(memory_bytes=1 << 30)
    room = int(0.9 * (1 << 30) - 2 * ModelParameters.from_config(fields).stored)
    assert CostModel.from_config(fields, spec, device, cache_bytes=room - 8).num_devices == 1
    with pytest.raises(UserError, match=r"^tp_size=1: .*tp_size=auto"):
        CostModel.from_config(fields, spec, device, cache_bytes=room + 8)


def test_the_number_of_devices_leaves_a_quarter_for_the_cache() -> None:
    """Weights take at most 0.75 * 0.9 of the devices that hold them."""
    fields = shipped_fields("tiny")
    weights = 2 * ModelParameters.from_config(fields).stored
    for share, ranks in ((0.67, 1), (0.68, 2), (0.9, 2), (1.34, 2), (1.36, 4)):
        assert least_ranks(fields, DeviceSpec(memory_bytes=weights / share)) == ranks, share


def test_the_head_multiplies_what_is_sampled_and_no_more() -> None:
    """1,500 rows decode beside 64 tokens of a prompt that samples nothing: 2 x 400 x 1,500 FLOPs outweigh 800 B of weights."""
    rows = [ScheduledTokens(Sequence(i, 10, 9, num_computed=10, num_output=1), 10, 1) for i in range(1500)]
    step = Step([*rows, ScheduledTokens(Sequence(1500, 100, 9), 0, 64)])
    head = CostModel(PARAMETERS, SPEC, DEVICE).explain(step)["head"]
    assert head == pytest.approx(2 * 400 * 1500 / 0.4e9)
    assert head > 400 * 2 / 0.5e6
