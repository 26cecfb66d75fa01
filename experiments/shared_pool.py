"""Experiment ``shared_pool``: how many bytes each memory-sharing strategy wastes, and what that costs.

Three phases: *capacity* and *simulation* at the geometry of ``cfg.model`` (the 80B by default), *inference* with the model
of ``cfg.inference`` on this device.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.harness import CONSOLE, ProgressBar, write_results
from experiments.phases.capacity import capacity_rows
from experiments.phases.simulation import simulation_rows
from experiments.strategies import StrategyChoice, choose_strategies
from experiments.tables import print_capacity, print_runs
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError, bad
from hybridcache.observe.events import EventWriter
from hybridcache.observe.report import write_report
from hybridcache.sim.cost_model import CostModel, DeviceSpec
from hybridcache.spec import CacheSpec
from hybridcache.workloads import build_workload, cut_to_size, with_text_prompts
from hybridcache.workloads.base import Workload

PHASES = ("capacity", "simulation", "inference")
GIB = 1 << 30

Prepared = tuple[int, Callable[[EventWriter], Iterator[dict[str, Any]]]]
"""A phase whose input was checked: how many rows it will give, and what gives them."""


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Run the phases in ``cfg.phases``; write ``results.parquet``, ``events.jsonl``, figures and the report.

    Raises:
        UserError: bad input, before anything long starts.
        RuntimeError: strategies sampled different tokens in float64, where they must agree.
    """
    if cfg.fast:
        cfg = _fast(cfg)
    for phase in cfg.phases:
        if phase not in PHASES:
            raise bad("phases", phase, f"choose some of {', '.join(PHASES)}")
    choices = choose_strategies(cfg)
    workload = _workload(cfg)
    producers = {"capacity": _capacity, "simulation": _simulation, "inference": _inference}
    prepared = [(phase, producers[phase](cfg, choices, workload)) for phase in cfg.phases]
    rows: list[dict[str, Any]] = []
    with EventWriter(run_dir / "events.jsonl") as events, ProgressBar(12) as progress:
        for phase, (total, produce) in prepared:
            task = progress.add_task(phase, total=total)
            for row in produce(events):
                rows.append({"experiment": cfg.experiment_name, "model": cfg.model.name, **row})
                write_results(rows, run_dir)  # after every row: what is measured is not lost
                progress.advance(task)
    results = write_results(rows, run_dir)
    write_report(run_dir)
    print_capacity(CONSOLE, results)
    print_runs(CONSOLE, results, "simulation")
    print_runs(CONSOLE, results, "inference")
    _check_tokens(results)
    return results


def _fast(cfg: DictConfig) -> DictConfig:
    """The short form: fewer lengths and requests, everything else as it is."""
    short = {
        "capacity": {"budget_gib": 2, "lengths": [12, 2000]},
        "simulation": {"budget_gib": 2, "num_requests": 40},
        "inference": {"num_requests": 6, "max_prompt": 96, "max_output": 8, "budget_requests": 2.0},
    }
    return OmegaConf.merge(cfg, short)  # type: ignore[return-value]


def _workload(cfg: DictConfig) -> Workload:
    options = _plain(cfg.workload)
    name = options.pop("name", None)
    if name is None:
        raise UserError("workload.name=None: choose a workload with workload=NAME")
    return build_workload(name, **options)


def _capacity(cfg: DictConfig, choices: list[StrategyChoice], workload: Workload) -> Prepared:
    spec, budget = _spec(cfg), int(cfg.capacity.budget_gib * GIB)
    for choice in choices:
        choice.build(spec, budget)
    lengths = list(cfg.capacity.lengths)
    return len(choices) * len(lengths), lambda events: capacity_rows(choices, spec, budget, lengths, events)


def _simulation(cfg: DictConfig, choices: list[StrategyChoice], workload: Workload) -> Prepared:
    spec, budget = _spec(cfg), int(cfg.simulation.budget_gib * GIB)
    for choice in choices:
        choice.build(spec, budget)
    device = DeviceSpec(**_plain(cfg.device))
    cost_model = CostModel.from_config(_plain(cfg.model.hf_config), spec, device, cache_bytes=budget)
    scheduler = SchedulerConfig(**_plain(cfg.engine))
    stream = Workload(workload.name, workload.source, workload.requests[: cfg.simulation.num_requests])
    repetitions = cfg.simulation.repetitions
    return len(choices) * repetitions, lambda events: simulation_rows(
        choices, spec, budget, stream, scheduler, cost_model, repetitions, events
    )


def _inference(cfg: DictConfig, choices: list[StrategyChoice], workload: Workload) -> Prepared:
    from experiments.phases.inference import InferencePhase, InferenceSettings

    settings = InferenceSettings.resolve(cfg.inference, "inference")
    physical = [choice for choice in choices if choice.supports_physical]
    if not physical:
        raise bad("strategies", list(cfg.strategies), "none is physical; inference needs one, e.g. shared_pool")
    scheduler = SchedulerConfig(**{**_plain(cfg.engine), "max_tokens_per_step": settings.max_tokens_per_step})
    phase = InferencePhase(settings, cfg.seed)
    stream = cut_to_size(
        workload,
        max_prompt=settings.max_prompt,
        max_output=settings.max_output,
        num_requests=settings.num_requests,
        keep_ratio=False,  # one factor would leave most outputs a single token
    )
    if phase.tokenizer is None:
        raise bad("inference.model", settings.model, "its vocabulary has no room for bytes and it has no tokenizer")
    stream = with_text_prompts(stream, phase.tokenizer, seed=cfg.seed)
    budget = settings.budget(phase.spec, stream)
    for choice in physical:
        choice.build(phase.spec, budget, physical=True)
    return len(physical) * settings.repetitions, lambda events: phase.rows(physical, budget, stream, scheduler, events)


def _spec(cfg: DictConfig) -> CacheSpec:
    return CacheSpec.from_config(
        _plain(cfg.model.hf_config), kv_dtype=cfg.kv_dtype, state_dtype=cfg.state_dtype, tp_size=cfg.tp_size
    )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def _check_tokens(results: pd.DataFrame) -> None:
    inference = results[results["phase"] == "inference"] if "phase" in results else results
    if inference.empty:
        return
    agree = inference["tokens_sha256"].nunique() == 1
    exact = set(inference["dtype"]) == {"float64"} and set(inference["backend"]) == {"torch"}
    if exact and not agree:
        raise RuntimeError(
            "strategies sampled different tokens in float64 on the torch backend, where they must agree: "
            + ", ".join(f"{r.strategy}={r.tokens_sha256[:8]}" for r in inference.itertuples())
        )
    verdict = "agree" if agree else "differ (near-ties may flip with the batch's shape in this precision)"
    CONSOLE.print(f"tokens across physical strategies: [bold]{verdict}[/]")
