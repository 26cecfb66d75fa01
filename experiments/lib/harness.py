"""What every experiment shares: its module, the run directory and its records, tracking, and progress on the terminal.

An experiment is a module with ``Config`` (what it reads, see ``experiments.lib.settings``), ``run(cfg, run_dir)``, and, where
something is left to choose, ``resolve(cfg)``, which returns the settings with every ``auto`` replaced and without the keys
that this run does not read.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments.lib.settings import (
    Common,
    check_model_fields,
    container,
    model_chosen,
    not_read,
    overridden,
    read_settings,
)
from experiments.lib.strategy_choices import CONF
from hybridcache.engine.garbage import settle_heap, unswept
from hybridcache.errors import UserError, bad
from hybridcache.observe.environment import environment
from hybridcache.observe.events import EventWriter
from hybridcache.observe.report import write_report
from hybridcache.observe.report.units import seconds_text
from hybridcache.observe.tracking import make_tracker

CONSOLE = Console(highlight=False)
"""As wide as the terminal, or as COLUMNS says, or 80."""


Rows = Callable[[EventWriter], Iterator[dict[str, Any]]]
"""Makes the rows of a phase, and writes its events."""


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
    """Names of the shipped experiments."""
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def experiment_module(name: str) -> ModuleType:
    """The experiment of that name: a shipped one, or a user's module by its dotted path.

    Raises:
        UserError: there is no such module, or it is no experiment.
    """
    known = f"choose one of {', '.join(experiment_names())}, or give the dotted path of a module of your own"
    if "." not in name and name not in experiment_names():
        raise bad("experiment_name", name, known)
    path = name if "." in name else f"experiments.{name}"
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # a module that the experiment itself needs
        raise bad("experiment_name", name, f"there is no module {error.name}; is its folder on PYTHONPATH?") from error
    schema = getattr(module, "Config", None)
    if not callable(getattr(module, "run", None)) or not (isinstance(schema, type) and issubclass(schema, Common)):
        raise bad("experiment_name", name, "is no experiment: it needs run(cfg, run_dir) and a Config; " + known)
    return module


def settings_of(module: ModuleType, cfg: DictConfig, overrides: Sequence[str] = ()) -> DictConfig:
    """What the run reads, every ``auto`` resolved: what ``config.yaml`` records.

    Raises:
        UserError: bad input, or an override that this run does not read.
    """
    settings = read_settings(cfg, module.Config, overrides)
    if model_chosen(settings):
        check_model_fields(container(settings.model.hf_config))
    if hasattr(module, "resolve"):
        settings = module.resolve(settings)
        for key in overridden(overrides):
            if key.partition(".")[0] not in settings:
                raise not_read(key, f"{cfg.experiment_name}, with these settings,", settings)
    return settings


def run_experiment(cfg: DictConfig, run_dir: Path, overrides: Sequence[str] = ()) -> None:
    """Run ``cfg.experiment_name`` and write everything that a run leaves behind into ``run_dir``.

    The results table and the events are on disk before the report is drawn, and before tracking ends.

    Raises:
        UserError: bad input, or a run directory that cannot be written.
    """
    with unswept():  # what is imported stays: a fifth of a short run would be collections that walk over it
        module = experiment_module(str(cfg.experiment_name))
        cfg = settings_of(module, cfg, overrides)
    settle_heap()
    started = time.perf_counter()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # It is appended to: an older run's would mix with this one's.
        (run_dir / "events.jsonl").unlink(missing_ok=True)
        OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
        env = environment()
        write_json(run_dir / "environment.json", env)
    except OSError as error:
        raise unwritable(error, run_dir) from error
    tracker = make_tracker(cfg.tracking, run_dir, container(cfg))
    try:
        results: pd.DataFrame = module.run(cfg, run_dir)
        tracker.log_run(run_dir, results)
    finally:
        tracker.finish()
    env["duration_s"] = round(time.perf_counter() - started, 1)
    write_json(run_dir / "environment.json", env)
    CONSOLE.print(f"\n[bold]run directory[/]  {_shown(run_dir)}   ({seconds_text(env['duration_s'])})")
    if (run_dir / "report.html").exists():
        CONSOLE.print(f"[bold]report[/]         {_shown(run_dir / 'report.html')}")


def unwritable(error: OSError, run_dir: Path | None = None) -> UserError:
    """The error of a run directory that cannot be made or written."""
    where = str(error.filename or run_dir)
    return bad("hydra.run.dir", where, f"cannot be written ({error.strerror}); choose another folder")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n")


def collect(cfg: DictConfig, run_dir: Path, phases: Iterable[tuple[str, int, Rows]]) -> pd.DataFrame:
    """Run phases in turn: each a name, a number of rows, and what makes them. Writes the events, and ``results.parquet``
    after every row so that what is measured is not lost; then figures and the report."""
    model = (cfg.get("model") or {}).get("name")
    rows: list[dict[str, Any]] = []
    with EventWriter(run_dir / "events.jsonl") as events, ProgressBar(32) as progress:
        for phase, total, produce in phases:
            task = progress.add_task(phase, total=total)
            for row in produce(events):
                rows.append({"experiment": cfg.experiment_name, "model": model, **row})
                results = write_results(rows, run_dir)
                progress.update(task, advance=1, description=f"{phase}: {row['strategy']}")
    write_report(run_dir)
    return results


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
