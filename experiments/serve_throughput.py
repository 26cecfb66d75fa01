"""Experiment ``serve_throughput``: how many tokens a second the engine serves under each physical strategy.

Five workloads of fixed lengths, all requests at once, greedy, one engine a strategy; and where the time of a decode and of
a prefill step goes.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.harness import CONSOLE, ProgressBar, write_results
from experiments.phases.serving import ServingPhase, ServingSettings
from experiments.strategies import choose_strategies
from experiments.tables import print_throughput
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import bad
from hybridcache.observe.events import EventWriter
from hybridcache.observe.report import write_report


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Serve every workload under every strategy; write ``results.parquet`` after every row, then figures and the report.

    Raises:
        UserError: bad input, before the model is loaded where that can be known.
    """
    if cfg.fast:
        cfg = OmegaConf.merge(cfg, FAST)  # type: ignore[assignment]
    choices = choose_strategies(cfg)
    virtual = [choice.label for choice in choices if not choice.supports_physical]
    if virtual:
        raise bad("strategies", virtual, "have no physical memory to serve from; leave them out")
    settings = ServingSettings.resolve(cfg.serving, "serving")
    engine: dict[str, Any] = OmegaConf.to_container(cfg.engine, resolve=True)  # type: ignore[assignment]
    scheduler = SchedulerConfig(**{**engine, "max_tokens_per_step": settings.max_tokens_per_step})
    phase = ServingPhase(settings, cfg.seed)
    workloads = settings.streams(phase.model.config.vocab_size, cfg.seed)
    for choice in choices:
        choice.build(phase.spec, settings.cache_bytes)
    trace_dir = run_dir if cfg.serve_trace else None
    rows: list[dict[str, Any]] = []
    with EventWriter(run_dir / "events.jsonl") as events, ProgressBar(32) as progress:
        task = progress.add_task("serve", total=len(choices) * len(workloads) * settings.repetitions)
        for row in phase.rows(choices, workloads, scheduler, events, trace_dir):
            rows.append({"experiment": cfg.experiment_name, **row})
            write_results(rows, run_dir)  # after every row: what is measured is not lost
            progress.update(task, advance=1, description=f"{row['strategy']}, {row['workload']}")
    results = write_results(rows, run_dir)
    write_report(run_dir)
    print_throughput(CONSOLE, results)
    return results


FAST = {"serving": {"repetitions": 1, "workloads": {"bs1": [1, 8, 4], "chat": [4, 24, 4]}}}
"""The short form for tests, on any device."""
