"""What every experiment shares: the run directory, its records, tracking, and the final table."""

import json
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hybridcache.config import typed
from hybridcache.errors import bad
from hybridcache.observe.environment import environment
from hybridcache.observe.tracking import make_tracker

CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


class ProgressBar(Progress):
    """How far an experiment is. Redrawn only when it has got further: a thread that redraws it ten times a second would take
    the interpreter from the launches that are being timed.

    Args:
        width: characters of a task's description.
    """

    def __init__(self, width: int) -> None:
        columns = (TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=CONSOLE, auto_refresh=False)

    def update(self, task_id: TaskID, **fields: Any) -> None:  # type: ignore[override]
        super().update(task_id, refresh=True, **fields)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.refresh()


def experiment_names() -> list[str]:
    """Names of the experiments that ``+experiment=`` takes."""
    conf = Path(__file__).resolve().parent.parent / "conf" / "experiment"
    return sorted(path.stem for path in conf.glob("*.yaml"))


def run_experiment(cfg: DictConfig, run_dir: Path) -> None:
    """Run ``cfg.experiment_name`` and write everything that a run leaves behind into ``run_dir``.

    The results table and the events are on disk before the report is drawn, and before tracking ends.
    """
    cfg = typed(cfg)
    name = cfg.experiment_name
    try:
        module = import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"experiments.{name}":
            raise
        raise bad("experiment_name", name, f"choose one of {', '.join(experiment_names())}") from error
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "events.jsonl").unlink(missing_ok=True)  # it is appended to; an older run's would mix with this one's
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    started = time.perf_counter()
    env = environment()
    write_json(run_dir / "environment.json", env)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    tracker = make_tracker(cfg.tracking, run_dir, config)
    try:
        results: pd.DataFrame = module.run(cfg, run_dir)
        tracker.log_run(run_dir, results)
    finally:
        tracker.finish()
    env["duration_s"] = round(time.perf_counter() - started, 1)
    write_json(run_dir / "environment.json", env)
    CONSOLE.print(f"\n[bold]run directory[/]  {_shown(run_dir)}   ({env['duration_s']} s)")
    if (run_dir / "report.html").exists():
        CONSOLE.print(f"[bold]report[/]         {_shown(run_dir / 'report.html')}")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n")


def write_results(rows: Iterable[dict[str, Any]], run_dir: Path) -> pd.DataFrame:
    """``results.parquet``: one row per phase x strategy x workload x repetition."""
    results = pd.DataFrame(list(rows))
    results.to_parquet(run_dir / "results.parquet", index=False)
    return results


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
