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
from experiments.lib.harness import CONSOLE, Rows, collect
from experiments.lib.phases.reuse_simulation import (
    MOST_PROCESSES,
    Case,
    driver_of,
    refusals,
    rows_of,
    streams_of,
    with_ids,
)
from experiments.lib.policy_sets import Eviction, Placement, PolicySet, Retention, configured_policy, policy_sets
from experiments.lib.printed_tables import print_reuse
from experiments.lib.settings import max_request_tokens, model_chosen, resolve_model, scheduler_config, spec_of
from experiments.lib.strategy_choices import CacheMemory, choose_strategies
from hybridcache.errors import bad, number, whole
from hybridcache.workloads import Stream, Workload

PHASES = ("simulation", "inference")
MODEL = "qwen3_next_80b_a3b"
MAX_TOKENS_PER_STEP = 8192


@dataclass
class Simulation:
    budget_gb: float
    host_gb: float
    driver: str
    repetitions: int
    processes: int | str


@dataclass
class Inference(settings.RunsModel):
    cache_bytes: int | str
    shapes: Any
    system: Any
    prefill: Any
    prefill_every: int | str


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
    inference: Inference


FAST = {
    "simulation": {"budget_gb": 1.0, "processes": 1},
    "inference": {
        "shapes": {
            "turns_2000": {"conversations": [2], "first": 96, "output": 4, "new": 16, "rounds": 2},
            "second_turn_128": {"conversations": [1], "first": 128, "output": 2, "new": 8, "rounds": 2},
        },
        "system": {"requests": 4, "shared": 64, "own": 8, "output": 2},
        "prefill": [128],
    },
}
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
    simulates, infers = (phase in phases for phase in PHASES)
    configured_policy(cfg)
    if infers:
        from experiments.lib.phases.reuse_inference import resolve_reuse

        resolve_reuse(cfg)
    unread = [] if infers else ["inference"]
    if simulates:
        _resolve_simulation(cfg)
    else:  # what inference runs is told in its own section
        unread += ["simulation", "workload", "device", "tp_size", *([] if model_chosen(cfg) else ["model"])]
        cfg.kv_dtype, cfg.state_dtype = cfg.inference.kv_dtype, cfg.inference.state_dtype
    if cfg.engine.max_tokens_per_step == "auto":
        cfg.engine.max_tokens_per_step = MAX_TOKENS_PER_STEP if simulates else cfg.inference.max_tokens_per_step
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
    with_ids(cfg)


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Run the phases in ``cfg.phases``; write ``results.parquet`` (a row a policy set, workload and repetition),
    ``events.jsonl``, figures and the report.

    Raises:
        UserError: bad input, before anything long starts.
    """
    producers = {"simulation": _simulation, "inference": _inference}
    results = collect(cfg, run_dir, [(phase, *producers[phase](cfg)) for phase in cfg.phases])
    print_reuse(CONSOLE, results)
    _check_tokens(results)
    return results


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


def _inference(cfg: DictConfig) -> tuple[int, Rows]:
    """Every physical strategy under the common policy; the first one under other orders, and without reuse."""
    from experiments.lib.phases.reuse_inference import ReusePhase

    choices = [choice for choice in choose_strategies(cfg) if choice.supports_physical]
    if not choices:
        raise bad("strategies", list(cfg.strategies), "none is physical; inference needs one")
    names = [name for name in cfg.policies if name != "own"]
    phase = ReusePhase(cfg, policy_sets(choices, names, configured_policy(cfg), bound=False))
    return len(phase), phase.rows


def _check_tokens(results: pd.DataFrame) -> None:
    """Reuse must not change a token, in float64 at least."""
    rows = results[results["phase"] == "inference"]
    if rows.empty or set(rows["dtype"]) != {"float64"}:
        return
    keys = ["workload", "conversations", "round", "repetition"]
    differ = rows.dropna(subset="tokens_sha256").groupby(keys)["tokens_sha256"].nunique() > 1
    if differ.any():
        raise RuntimeError(f"policies sampled different tokens in float64, where they must agree: {differ.idxmax()}")


def _sets(cfg: DictConfig, driver: str, stream: Stream) -> list[PolicySet]:
    """The scheduler's driver can tell the future of open streams only."""
    known = driver == "replay" or isinstance(stream, Workload)
    return policy_sets(choose_strategies(cfg), list(cfg.policies), configured_policy(cfg), bound=known)
