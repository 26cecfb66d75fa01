"""Experiment ``prefix_reuse``: how much of what requests ask for is found, under every strategy and policy.

Two phases: *simulation* at the geometry of the model (the 80B by default), *inference* with the model on this device.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.lib import settings
from experiments.lib.harness import Rows, collect
from experiments.lib.phases.reuse_simulation import Case, driver_of, refusals, rows_of, streams_of, with_ids
from experiments.lib.policy_sets import Eviction, Placement, PolicySet, Retention, configured_policy, policy_sets
from experiments.lib.settings import max_request_tokens, model_chosen, resolve_model, scheduler_config, spec_of
from experiments.lib.strategy_choices import CacheMemory, choose_strategies
from hybridcache.errors import bad, number, whole
from hybridcache.workloads import Stream, Workload

PHASES = ("simulation", "inference")
MODEL = "qwen3_next_80b_a3b"
MAX_TOKENS_PER_STEP = 8192
MOST_PROCESSES = 8


@dataclass
class Simulation:
    budget_gb: float
    host_gb: float
    driver: str
    repetitions: int
    processes: int | str


@dataclass
class Config(settings.Common):
    """What the experiment reads. :func:`resolve` takes out what its phases leave aside."""

    model: settings.Model
    workload: dict[str, Any]
    engine: settings.Engine  # type: ignore[valid-type]
    device: settings.Device  # type: ignore[valid-type]
    placement: Placement
    retention: Retention
    eviction: Eviction
    kv_dtype: str
    state_dtype: str
    tp_size: int
    seed: int
    phases: list[str]
    strategies: list[str]
    strategy_options: dict[str, Any]
    policies: list[str]
    simulation: Simulation


FAST = {"simulation": {"budget_gb": 1.0, "processes": 1}}
FAST_CONVERSATIONS = {"num_conversations": 8, "first_tokens": 600, "rounds": 3, "output_tokens": 20, "new_tokens": 80}
"""The short form: fewer and shorter conversations, in one process."""


def resolve(cfg: DictConfig) -> DictConfig:
    """The settings with every ``auto`` replaced, without what the chosen phases do not read.

    Raises:
        UserError: a value that makes no sense.
    """
    if cfg.fast:
        cfg = OmegaConf.merge(cfg, FAST)  # type: ignore[assignment]
        if cfg.workload.get("name") == "conversations":
            cfg.workload = OmegaConf.merge(cfg.workload, FAST_CONVERSATIONS)
    phases = list(cfg.phases)
    for phase in phases:
        if phase not in PHASES or phases.count(phase) > 1:
            raise bad("phases", phase, f"choose some of {', '.join(PHASES)}, each once")
    if not phases:
        raise bad("phases", phases, f"choose some of {', '.join(PHASES)}")
    simulates = "simulation" in phases
    configured_policy(cfg)
    if simulates:
        _resolve_simulation(cfg)
    unread = [] if simulates else ["simulation", "workload", "device", "tp_size"]
    if not simulates and not model_chosen(cfg):
        unread.append("model")
    scheduler_config(cfg)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in unread])


def _resolve_simulation(cfg: DictConfig) -> None:
    section = cfg.simulation
    number("simulation.budget_gb", section.budget_gb, above=True, fix="give a positive number of GB (1e9 bytes)")
    number("simulation.host_gb", section.host_gb, fix="give a number of GB (1e9 bytes), or 0 for none")
    whole("simulation.repetitions", section.repetitions)
    if section.processes == "auto":
        section.processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    whole("simulation.processes", section.processes, fix="give a positive whole number, or auto")
    resolve_model(cfg, MODEL)
    if cfg.engine.max_tokens_per_step == "auto":
        cfg.engine.max_tokens_per_step = MAX_TOKENS_PER_STEP
    with_ids(cfg)


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Run the phases in ``cfg.phases``; write ``results.parquet`` (a row a policy set, workload and repetition),
    ``events.jsonl``, figures and the report.

    Raises:
        UserError: bad input, before anything long starts.
    """
    producers = {"simulation": _simulation}
    return collect(cfg, run_dir, [(phase, *producers[phase](cfg)) for phase in cfg.phases])


def _simulation(cfg: DictConfig) -> tuple[int, Rows]:
    section = cfg.simulation
    streams = streams_of(cfg, section.repetitions)
    driver = driver_of(section.driver, streams[0][1])
    longest = max_request_tokens(cfg, cfg.model.name, cfg.model.hf_config.get("max_position_embeddings"))
    memory = CacheMemory(spec_of(cfg), int(section.budget_gb * 1e9), cfg.engine.max_running, longest)
    sets = _sets(cfg, driver, streams[0][1])
    cases = [
        Case(one, number, memory, int(section.host_gb * 1e9), driver) for number in range(len(streams)) for one in sets
    ]
    refusals(cases)
    return len(cases), lambda events: rows_of(cfg, cases, section.repetitions, section.processes, events)


def _sets(cfg: DictConfig, driver: str, stream: Stream) -> list[PolicySet]:
    """The scheduler's driver can tell the future of open streams only."""
    known = driver == "replay" or isinstance(stream, Workload)
    return policy_sets(choose_strategies(cfg), list(cfg.policies), configured_policy(cfg), bound=known)
