"""Experiment ``shared_pool``: how many bytes each memory-sharing strategy wastes, and what that costs.

Three phases: *capacity* and *simulation* at the geometry of ``cfg.model`` (the 80B by default), *inference* with the model
of ``cfg.inference`` on this device.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.harness import CONSOLE, write_results
from experiments.phases.capacity import capacity_rows
from experiments.phases.simulation import simulation_rows
from experiments.strategies import StrategyChoice, choose_strategies
from experiments.tables import print_capacity, print_runs
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError, bad
from hybridcache.events import EventWriter
from hybridcache.report import write_report
from hybridcache.sim.cost_model import CostModel, DeviceSpec
from hybridcache.spec import CacheSpec
from hybridcache.workloads import build_workload, cut_to_size, with_text_prompts
from hybridcache.workloads.base import Workload

PHASES = ("capacity", "simulation", "inference")
GIB = 1 << 30


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Run the phases in ``cfg.phases``; write ``results.parquet``, ``events.jsonl``, figures and the report.

    Raises:
        UserError: bad input, before anything long starts.
        RuntimeError: strategies sampled different tokens in float64, where they must agree.
    """
    for phase in cfg.phases:
        if phase not in PHASES:
            raise bad("phases", phase, f"choose some of {', '.join(PHASES)}")
    if cfg.fast:
        cfg = _fast(cfg)
    choices = choose_strategies(cfg)
    hf_config = OmegaConf.to_container(cfg.model.hf_config, resolve=True)
    spec = CacheSpec.from_config(hf_config, kv_dtype=cfg.kv_dtype, state_dtype=cfg.state_dtype, tp_size=cfg.tp_size)
    workload = _workload(cfg)
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with EventWriter(run_dir / "events.jsonl") as events, Progress(*columns, console=CONSOLE) as progress:
        for phase in cfg.phases:
            produce = {"capacity": _capacity, "simulation": _simulation, "inference": _inference}[phase]
            for row in produce(cfg, choices, spec, workload, events, progress):
                rows.append({"experiment": cfg.experiment_name, "model": cfg.model.name, **row})
                write_results(rows, run_dir)  # after every row: what is measured is not lost
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
    options = OmegaConf.to_container(cfg.workload, resolve=True)
    assert isinstance(options, dict)
    name = options.pop("name", None)
    if name is None:
        raise UserError("workload.name=None: choose a workload with workload=NAME")
    return build_workload(name, **options)


def _head(workload: Workload, count: int) -> Workload:
    return Workload(workload.name, workload.source, workload.requests[:count])


def _capacity(cfg, choices, spec, workload, events, progress) -> Iterator[dict[str, Any]]:
    task = progress.add_task("capacity", total=len(choices) * len(cfg.capacity.lengths))
    budget = int(cfg.capacity.budget_gib * GIB)
    for row in capacity_rows(choices, spec, budget, cfg.capacity.lengths, events):
        yield row
        progress.advance(task)


def _simulation(cfg, choices, spec, workload, events, progress) -> Iterator[dict[str, Any]]:
    device = DeviceSpec(**OmegaConf.to_container(cfg.device, resolve=True))
    hf_config = OmegaConf.to_container(cfg.model.hf_config, resolve=True)
    task = progress.add_task("simulation", total=len(choices) * cfg.simulation.repetitions)
    yield from simulation_rows(
        choices,
        spec,
        int(cfg.simulation.budget_gib * GIB),
        _head(workload, cfg.simulation.num_requests),
        SchedulerConfig(**OmegaConf.to_container(cfg.engine, resolve=True)),
        CostModel.from_config(hf_config, spec, device),
        cfg.simulation.repetitions,
        events,
        lambda label: progress.advance(task),
    )


def _inference(cfg, choices, spec, workload, events, progress) -> Iterator[dict[str, Any]]:
    from experiments.phases.inference import InferencePhase, InferenceSettings

    settings = InferenceSettings.resolve(cfg.inference)
    physical: list[StrategyChoice] = [choice for choice in choices if choice.supports_physical]
    if not physical:
        raise bad("strategies", list(cfg.strategies), "none is physical; inference needs one, e.g. shared_pool")
    task = progress.add_task("inference: loading", total=len(physical) * settings.repetitions)
    phase = InferencePhase(settings, cfg.seed)
    progress.update(task, description="inference")
    stream = cut_to_size(
        workload,
        max_prompt=settings.max_prompt,
        max_output=settings.max_output,
        num_requests=settings.num_requests,
        keep_ratio=False,  # one factor would leave most outputs a single token
    )
    stream = with_text_prompts(stream, phase.tokenizer, seed=cfg.seed)
    scheduler = OmegaConf.to_container(cfg.engine, resolve=True)
    scheduler["max_tokens_per_step"] = settings.max_tokens_per_step
    budget = settings.budget(phase.spec, stream)
    for row in phase.rows(
        physical, budget, stream, SchedulerConfig(**scheduler), events, lambda label: progress.advance(task)
    ):
        yield {**row, "model": settings.model}


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
