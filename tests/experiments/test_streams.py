"""Streams: a new one for each repetition, the same for every strategy; comparisons on the same requests; the tuned split."""

import random

import pytest
from omegaconf import OmegaConf

from experiments.lib.phases.capacity import capacity_rows
from experiments.lib.phases.simulation import SimulationPhase
from experiments.lib.static_ratio import MULTIPLES, balanced_ratio, with_best_ratio
from experiments.lib.strategy_choices import CacheMemory, StrategyChoice
from experiments.lib.streams import COMMON, comparable_streams, make_streams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError
from hybridcache.sim.cost_model import CostModel
from hybridcache.sim.simulator import simulate
from hybridcache.spec import CacheSpec
from hybridcache.workloads import Request, Workload, build_workload
from models.configs import shipped_fields

FIELDS = shipped_fields("tiny")
SPEC = CacheSpec.from_config(FIELDS)
COST = CostModel.from_config(FIELDS, SPEC)
MIB = 1 << 20


def choice(name: str, **options) -> StrategyChoice:
    return StrategyChoice(name, name, options)


def rows(choices, streams, budget=2 * MIB):
    found: list = []
    events = type("Events", (), {"write": lambda self, event: found.append(event)})()
    phase = SimulationPhase(choices, CacheMemory(SPEC, budget), streams, SchedulerConfig(), COST)
    made = list(phase.rows(events))
    assert len(made) == len(phase)
    return made


def test_repetitions_are_new_streams_paired_across_strategies() -> None:
    seed = random.randrange(1000)
    cfg = OmegaConf.create(
        {"workload": {"name": "synthetic_chat", "num_requests": 12, "max_prompt": 500, "seed": seed}}
    )
    streams = make_streams(cfg, 3, "repetitions")
    assert [each for each, _ in streams] == [seed, seed + 1, seed + 2]
    for each, stream in streams:
        assert stream == build_workload("synthetic_chat", num_requests=12, max_prompt=500, seed=each)
    made = rows([choice("shared_pool"), choice("byte_exact")], streams)
    assert [(row["strategy"], row["repetition"], row["seed"]) for row in made] == [
        (name, k, seed + k) for name in ("shared_pool", "byte_exact") for k in range(3)
    ]
    totals = [(row["prompt_tokens"], row["output_tokens"]) for row in made]
    assert totals[:3] == totals[3:] == [(s.prompt_tokens, s.output_tokens) for _, s in streams]
    assert len(set(totals)) == 3


def test_a_stream_without_a_seed_has_one_repetition() -> None:
    cfg = OmegaConf.create({"workload": {"name": "azure", "path": "x"}, "seed": 3})
    with pytest.raises(UserError, match="repetitions=2: workload azure has no seed"):
        make_streams(cfg, 2, "repetitions")


def test_strategies_that_refuse_differently_are_compared_on_common_requests() -> None:
    lengths = [10, 20, 30, 40]
    stream = Workload("w", "by hand", tuple(Request(i, 0.0, n, 1) for i, n in enumerate(lengths)))
    assert comparable_streams(stream, [40, 50]) == [stream]
    assert comparable_streams(stream, [30, 30]) == [stream], "both refuse the same"
    whole, common = comparable_streams(stream, [30, 20, 99])
    assert whole == stream
    assert [r.prompt_tokens for r in common.requests] == [10, 20]
    assert common.name == "w" + COMMON
    assert common.source == "by hand (the 2 of 4 requests that every strategy holds)"


def test_refused_requests_stand_in_the_rows() -> None:
    """A split with little KV refuses the long request that a shared pool serves."""
    small, large = choice("static_split", ratio=3.0), choice("shared_pool")
    limits = [each.build(CacheMemory(SPEC, 2 * MIB)).request_limit() for each in (small, large)]
    assert limits[0] < limits[1]
    stream = Workload("w", "s", (Request(0, 0.0, 50, 4), Request(1, 0.0, limits[0], 2), Request(2, 0.0, 50, 4)))
    made = rows([small, large], [(0, stream)])
    counts = [tuple(row[f"requests_{kind}"] for kind in ("offered", "served", "refused")) for row in made]
    assert counts == [(3, 2, 1), (2, 2, 0), (3, 3, 0), (2, 2, 0)]
    assert [row["workload"] for row in made] == ["w", "w" + COMMON] * 2
    assert [row["output_tokens"] for row in made] == [8, 8, 10, 8]
    for row in made:
        assert (row["tp_size"], row["num_devices"], row["kv_dtype"], row["state_dtype"]) == (
            1,
            1,
            "bfloat16",
            "float32",
        )
    assert made[0]["strategy_options"] == '{"ratio": 3.0}'


def test_the_balanced_ratio_by_hand() -> None:
    """A request of 100 + 20 tokens holds 110 on average, one of 10 + 60 holds 40; they run 20 and 60 steps: 57.5."""
    stream = Workload("w", "s", (Request(0, 0.0, 100, 20), Request(1, 0.0, 10, 60)))
    expected = SPEC.state_bytes / (SPEC.kv_bytes_per_token * 57.5)
    assert balanced_ratio(CacheMemory(SPEC, MIB), [stream]) == pytest.approx(expected)


@pytest.mark.parametrize("prompt", [8, 900])
def test_the_best_ratio_is_at_least_as_fast_as_any_of_a_grid(prompt: int) -> None:
    stream = build_workload("fixed_lengths", num_requests=60, prompt_tokens=prompt, output_tokens=40, end_id=2000)
    memory = CacheMemory(SPEC, 4 * MIB)
    (tuned,) = with_best_ratio([choice("static_split", ratio="best")], memory, [stream], SchedulerConfig(), COST)
    assert tuned.searched == ("ratio",)
    assert tuned.columns()["searched_options"] == f"ratio={tuned.options['ratio']}"

    def duration(ratio: float) -> float:
        split = choice("static_split", ratio=ratio, page_size=64).build(memory)
        return simulate(stream, split, SchedulerConfig(), COST).duration_s

    assert duration(tuned.options["ratio"]) <= duration(0.9)
    assert duration(tuned.options["ratio"]) <= 1.03 * min(duration(r) for r in (0.1, 0.3, 0.6, 1, 1.5, 2.5, 4, 7, 12))


def test_a_budget_that_no_ratio_serves_is_refused() -> None:
    stream = build_workload("fixed_lengths", num_requests=2, prompt_tokens=9, output_tokens=4)
    with pytest.raises(UserError, match=r"strategy_options.static_split.ratio='best': no ratio serves this budget"):
        with_best_ratio(
            [choice("static_split", ratio="best")], CacheMemory(SPEC, 1000), [stream], SchedulerConfig(), COST
        )


def test_tables_are_charged_to_strategies_that_know_them(monkeypatch) -> None:
    """What a strategy's constructor takes of ``table_rows`` and ``max_request_tokens`` it is given."""
    seen: dict = {}

    def build(target, **arguments):
        seen.update(arguments)

    class Knows:
        def __init__(self, spec, budget_bytes, *, physical=False, table_rows=0, max_request_tokens=None): ...

    monkeypatch.setattr("experiments.lib.strategy_choices.build", build)
    monkeypatch.setattr("experiments.lib.strategy_choices.strategy_class", lambda name: Knows)
    choice("knows", a=1).build(CacheMemory(SPEC, MIB, 256, 8192))
    assert (seen["table_rows"], seen["max_request_tokens"], seen["a"]) == (256, 8192, 1)


def test_the_best_ratio_refuses_nobody() -> None:
    """A long request among many short ones: a border that leaves it out ends sooner, and is not the best."""
    limit = choice("static_split", ratio=0.9, page_size=64).build(CacheMemory(SPEC, 2 * MIB)).request_limit()
    short = [Request(i, 0.0, 4, 60) for i in range(1, 120)]
    stream = Workload("w", "s", (Request(0, 0.0, limit - 4, 4), *short))
    memory = CacheMemory(SPEC, 2 * MIB)
    (tuned,) = with_best_ratio([choice("static_split", ratio="best")], memory, [stream], SchedulerConfig(), COST)

    def run(ratio: float):
        return simulate(
            stream, choice("static_split", ratio=ratio, page_size=64).build(memory), SchedulerConfig(), COST
        )

    sooner = [run(round(m * balanced_ratio(memory, [stream]), 3)) for m in MULTIPLES]
    best = run(tuned.options["ratio"])
    assert best.refused == 0
    assert min(each.duration_s for each in sooner if each.refused) < best.duration_s, "nothing would be gained"


def test_a_length_of_which_none_fits_is_refused() -> None:
    events = type("Events", (), {"write": lambda self, event: None})()
    memory = CacheMemory(SPEC, 2 * MIB)
    limit = choice("shared_pool").build(memory).request_limit()
    made = list(capacity_rows([choice("shared_pool")], memory, [10, limit + 1], 0, events))
    assert [row["requests_refused"] for row in made] == [0, 1]
    assert made[0]["requests_served"] == made[0]["residents_peak"] > 1
    assert made[1]["requests_served"] == 0
