"""Experiment ``serve_throughput``: how many tokens a second the engine serves under each physical strategy.

Five workloads of fixed lengths, all requests at once, greedy, one engine a strategy; and where the time of a decode and of
a prefill step goes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.lib import settings
from experiments.lib.harness import CONSOLE, collect
from experiments.lib.phases.serving import ServingPhase, resolve_serving
from experiments.lib.printed_tables import print_throughput
from experiments.lib.settings import model_chosen, scheduler_config
from experiments.lib.strategy_choices import choose_strategies
from hybridcache.errors import bad


@dataclass
class Serving(settings.RunsModel):
    cache_bytes: int | str
    workloads: Any
    profile_rows: int | str
    profile_context: int | str


@dataclass
class Config(settings.Common):
    """What the experiment reads."""

    model: settings.Model
    engine: settings.Engine  # type: ignore[valid-type]
    kv_dtype: str
    state_dtype: str
    seed: int
    strategies: list[str]
    strategy_options: dict[str, Any]
    serving: Serving
    serve_trace: bool


FAST = {"serving": {"repetitions": 1, "workloads": {"bs1": [1, 8, 4], "chat": [4, 24, 4]}}}
"""The short form for tests, on any device."""


def resolve(cfg: DictConfig) -> DictConfig:
    """The settings with every ``auto`` replaced. Where no model was chosen, the section says which one runs.

    Raises:
        UserError: a value that makes no sense.
    """
    if cfg.fast:
        cfg = OmegaConf.merge(cfg, FAST)  # type: ignore[assignment]
    resolve_serving(cfg)
    cfg.kv_dtype, cfg.state_dtype = cfg.serving.kv_dtype, cfg.serving.state_dtype
    cfg.engine.max_tokens_per_step = cfg.serving.max_tokens_per_step
    scheduler_config(cfg)
    return cfg if model_chosen(cfg) else OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "model"])


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Serve every workload under every strategy; write ``results.parquet`` after every row, then figures and the report.

    Raises:
        UserError: bad input, before the model is loaded where that can be known.
    """
    choices = choose_strategies(cfg)
    virtual = [choice.label for choice in choices if not choice.supports_physical]
    if virtual:
        raise bad("strategies", virtual, "have no physical memory to serve from; leave them out")
    phase = ServingPhase(cfg, choices)
    trace_dir = run_dir if cfg.serve_trace else None
    results = collect(cfg, run_dir, [("serve", len(phase), lambda events: phase.rows(events, trace_dir))])
    print_throughput(CONSOLE, results)
    return results
