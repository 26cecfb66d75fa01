"""Experiment ``shared_pool``: how many bytes each memory-sharing strategy wastes, and what that costs.

Three phases: *capacity* and *simulation* at the geometry of the model (the 80B by default), *inference* with the model on
this device; where no model was chosen, a small one stands in there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.lib import settings
from experiments.lib.harness import CONSOLE, Rows, collect
from experiments.lib.phases.capacity import capacity_rows
from experiments.lib.phases.simulation import SimulationPhase
from experiments.lib.printed_tables import print_capacity, print_runs
from experiments.lib.settings import (
    container,
    max_request_tokens,
    model_chosen,
    resolve_model,
    scheduler_config,
    spec_of,
)
from experiments.lib.static_ratio import wants_ratio, with_best_ratio
from experiments.lib.strategy_choices import CacheMemory, StrategyChoice, choose_strategies
from experiments.lib.streams import make_streams, workload_target
from hybridcache.errors import bad, number, whole
from hybridcache.sim.cost_model import CostModel, DeviceSpec, least_ranks
from hybridcache.workloads import Workload, takes_seed

PHASES = ("capacity", "simulation", "inference")
MODEL = "qwen3_next_80b_a3b"
"""What capacity and simulation are about where no model was chosen."""
MAX_TOKENS_PER_STEP = 8192
GIB = 1 << 30


@dataclass
class Capacity:
    budget_gib: float
    lengths: list[int]


@dataclass
class Simulation:
    budget_gib: float
    repetitions: int
    num_requests: int | None


@dataclass
class Inference(settings.RunsModel):
    budget_bytes: int | str
    budget_requests: int | float | str
    num_requests: int | str
    max_prompt: int | str
    max_output: int | str


@dataclass
class Config(settings.Common):
    """What the experiment reads. :func:`resolve` takes out what its phases leave aside."""

    model: settings.Model
    workload: dict[str, Any]
    engine: settings.Engine  # type: ignore[valid-type]
    device: settings.Device  # type: ignore[valid-type]
    kv_dtype: str
    state_dtype: str
    tp_size: int | str
    seed: int
    strategies: list[str]
    strategy_options: dict[str, Any]
    phases: list[str]
    capacity: Capacity
    simulation: Simulation
    inference: Inference


FAST = {
    "capacity": {"budget_gib": 1, "lengths": [12, 2000]},
    "simulation": {"budget_gib": 1, "num_requests": 40},
    "inference": {"num_requests": 6, "max_prompt": 96, "max_output": 8, "budget_requests": 2.0},
}
"""The short form: fewer lengths and requests, everything else as it is."""


def resolve(cfg: DictConfig) -> DictConfig:
    """The settings with every ``auto`` replaced, without what the chosen phases do not read.

    Raises:
        UserError: a value that makes no sense.
    """
    if cfg.fast:
        cfg = OmegaConf.merge(cfg, FAST)  # type: ignore[assignment]
    phases = list(cfg.phases)
    for phase in phases:
        if phase not in PHASES or phases.count(phase) > 1:
            raise bad("phases", phase, f"choose some of {', '.join(PHASES)}, each once")
    if not phases:
        raise bad("phases", phases, f"choose some of {', '.join(PHASES)}")
    accounts, simulates, infers = (phase in phases for phase in PHASES)
    tunes = wants_ratio(choose_strategies(cfg))
    if infers:
        from experiments.lib.phases.inference import resolve_inference

        resolve_inference(cfg)
    _check_numbers(cfg)
    streams = simulates or infers or tunes
    unread = {
        "capacity": not accounts,
        "simulation": not simulates,
        "inference": not infers,
        "workload": not streams,
        "tp_size": not (accounts or simulates),
        "device": not (simulates or tunes or (accounts and cfg.tp_size == "auto")),
        "seed": not infers and not (streams and takes_seed(workload_target(cfg))),
    }
    if accounts or simulates:
        _resolve_geometry(cfg)
    else:  # what inference runs is told in its own section
        unread |= {"model": not model_chosen(cfg)}
        cfg.kv_dtype, cfg.state_dtype = cfg.inference.kv_dtype, cfg.inference.state_dtype
    if cfg.engine.max_tokens_per_step == "auto":
        found = MAX_TOKENS_PER_STEP if simulates or not infers else cfg.inference.max_tokens_per_step
        cfg.engine.max_tokens_per_step = found
    scheduler_config(cfg)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if not unread.get(str(key))])


def _resolve_geometry(cfg: DictConfig) -> None:
    """The model, dtypes and machine of capacity and simulation."""
    resolve_model(cfg, MODEL)
    _longest(cfg)
    if cfg.tp_size == "auto":
        cfg.tp_size = least_ranks(container(cfg.model.hf_config), DeviceSpec(**container(cfg.device)))
    if isinstance(cfg.tp_size, str):
        raise bad("tp_size", cfg.tp_size, "give the number of tensor-parallel ranks, or auto")
    spec = spec_of(cfg)
    cfg.kv_dtype = spec.attention.dtype if spec.attention else cfg.kv_dtype
    cfg.state_dtype = spec.state.recurrent_dtype if spec.state else cfg.state_dtype


def _check_numbers(cfg: DictConfig) -> None:
    for section in ("capacity", "simulation"):
        number(f"{section}.budget_gib", cfg[section].budget_gib, above=True, fix="give a positive number of GiB")
    if not cfg.capacity.lengths:
        raise bad("capacity.lengths", [], "give at least one length in tokens")
    for length in cfg.capacity.lengths:
        if length < 1 or list(cfg.capacity.lengths).count(length) > 1:
            raise bad("capacity.lengths", length, "give lengths of 1 token or more, each once")
    for name in ("repetitions", "num_requests"):
        value = cfg.simulation[name]
        if value is not None:
            whole(f"simulation.{name}", value, fix="give a positive whole number")


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Run the phases in ``cfg.phases``; write ``results.parquet``, ``events.jsonl``, figures and the report.

    Raises:
        UserError: bad input, before anything long starts.
        RuntimeError: strategies sampled different tokens in float64, where they must agree.
    """
    choices = choose_strategies(cfg)
    producers = {"capacity": _capacity, "simulation": _simulation, "inference": _inference}
    tuned = _tuned(cfg, choices)
    prepared = [(phase, *producers[phase](cfg, choices if phase == "inference" else tuned)) for phase in cfg.phases]
    results = collect(cfg, run_dir, prepared)
    print_capacity(CONSOLE, results)
    print_runs(CONSOLE, results, "simulation")
    print_runs(CONSOLE, results, "inference")
    _check_tokens(results)
    return results


def _tuned(cfg: DictConfig, choices: list[StrategyChoice]) -> list[StrategyChoice]:
    """The strategies of capacity and simulation where they have one budget: a searched ratio is searched once."""
    budgets = {cfg[phase].budget_gib for phase in ("capacity", "simulation") if phase in cfg.phases}
    return _with_ratios(cfg, choices, _memory(cfg, budgets.pop())) if len(budgets) == 1 else choices


def _with_ratios(cfg: DictConfig, choices: list[StrategyChoice], memory: CacheMemory) -> list[StrategyChoice]:
    if not wants_ratio(choices):
        return choices
    count = cfg.simulation.num_requests if "simulation" in cfg else None
    streams = [stream.first(count) for _, stream in _streams(cfg, 1)]
    return with_best_ratio(choices, memory, streams, scheduler_config(cfg), _cost_model(cfg, memory))


def _capacity(cfg: DictConfig, choices: list[StrategyChoice]) -> tuple[int, Rows]:
    memory, lengths, seed = _memory(cfg, cfg.capacity.budget_gib), list(cfg.capacity.lengths), cfg.get("seed", 0)
    choices = _with_ratios(cfg, choices, memory)
    for choice in choices:
        choice.build(memory)
    return len(choices) * len(lengths), lambda events: capacity_rows(choices, memory, lengths, seed, events)


def _simulation(cfg: DictConfig, choices: list[StrategyChoice]) -> tuple[int, Rows]:
    memory, count = _memory(cfg, cfg.simulation.budget_gib), cfg.simulation.num_requests
    streams = [(seed, stream.first(count)) for seed, stream in _streams(cfg, cfg.simulation.repetitions)]
    phase = SimulationPhase(choices, memory, streams, scheduler_config(cfg), _cost_model(cfg, memory))
    return len(phase), phase.rows


def _inference(cfg: DictConfig, choices: list[StrategyChoice]) -> tuple[int, Rows]:
    from experiments.lib.phases.inference import InferencePhase

    (_, stream), *_ = _streams(cfg, 1)
    phase = InferencePhase(cfg, choices, stream)
    return len(phase), phase.rows


def _streams(cfg: DictConfig, repetitions: int) -> list[tuple[int, Workload]]:
    return make_streams(cfg, repetitions, "simulation.repetitions")


def _cost_model(cfg: DictConfig, memory: CacheMemory) -> CostModel:
    device = DeviceSpec(**container(cfg.device))
    fields = container(cfg.model.hf_config)
    return CostModel.from_config(fields, memory.spec, device, cache_bytes=memory.budget_bytes)


def _memory(cfg: DictConfig, budget_gib: float) -> CacheMemory:
    return CacheMemory(spec_of(cfg), int(budget_gib * GIB), cfg.engine.max_running, _longest(cfg))


def _longest(cfg: DictConfig) -> int | None:
    return max_request_tokens(cfg, cfg.model.name, cfg.model.hf_config.get("max_position_embeddings"))


def _check_tokens(results: pd.DataFrame) -> None:
    """Strategies that served the same requests must have sampled the same tokens, in float64 at least."""
    inference = results[results["phase"] == "inference"]
    if inference.empty or inference["tokens_sha256"].isna().all():  # no such phase, or no request was served
        return
    alike = inference.groupby(["workload", "requests_served"])["tokens_sha256"]
    agree = bool((alike.nunique() == 1).all())
    exact = all(set(inference[name]) == {"float64"} for name in ("dtype", "kv_dtype", "state_dtype"))
    if exact and set(inference["backend"]) == {"torch"} and not agree:
        raise RuntimeError(
            "strategies sampled different tokens in float64 on the torch backend, where they must agree: "
            + ", ".join(f"{r.strategy}={r.tokens_sha256[:8]}" for r in inference.itertuples())
        )
    verdict = "agree" if agree else "differ (near-ties may flip with the batch's shape in this precision)"
    CONSOLE.print(f"tokens across physical strategies: [bold]{verdict}[/]")
