"""Tracking: the same records as the run directory, for a dashboard.

The run directory is the record; a tracker only shows it elsewhere. So a tracker that fails says so and goes quiet: it never
takes results with it.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hybridcache.errors import bad
from hybridcache.observe.events import read_events
from hybridcache.observe.report.load import named_sets

LOG = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")
SERIES = ("phase", "strategy", "workload", "repetition")
"""Fields of a sample that name its series; the others are its values."""

ARTIFACT_FILES = ("results.parquet", "events.jsonl", "config.yaml", "report.html")
SETTINGS: dict[str, Any] = {"silent": True, "quiet": True, "console": "off", "show_errors": False}
SETTINGS |= {"show_warnings": False, "init_timeout": 60, "disable_code": True, "disable_job_creation": True}
MAX_POINTS = 200
"""Points of one series that a dashboard gets (events.jsonl keeps all): a point costs about 0.5 ms and 2 kB."""


class Tracker:
    """Where a run's records also go. This one tracks nothing (``mode: disabled``)."""

    def log_run(self, run_dir: Path, results: pd.DataFrame) -> None:
        """Show what a finished run left in its directory."""

    def finish(self) -> None:
        """End the run at the tracker; call it whatever happened before. Calling it again changes nothing."""


class WandbTracker(Tracker):
    """Weights & Biases. Starts its run at once, so that its system metrics cover the experiment.

    * every time series goes in as ``phase/strategy/workload.repetition/*`` over its own ``time_s``,
    * ``results`` is a table, and numbers of each row go into the summary under the same names,
    * results, events, configuration, report and figures form one artifact of type ``run``, taken from where they lie.

    Args:
        mode: ``offline`` (files only, no network) or ``online``.
        run_dir: the run directory; its name becomes the run's name.
        config: the resolved configuration, plain values.
        options: ``project``, ``entity``, ``group``, ``job_type``, ``tags`` and ``dir``, as ``wandb.init`` takes them.
    """

    def __init__(self, mode: str, run_dir: Path, config: Mapping[str, Any], **options: Any) -> None:
        self.run_dir = run_dir
        self.error: Exception | None = None
        """What ended tracking, if anything did."""
        self._run: Any = None

        def start() -> None:
            import wandb

            settings = wandb.Settings(**SETTINGS)
            name = run_dir.resolve().name
            self._run = wandb.init(mode=mode, name=name, config=dict(config), settings=settings, **options)  # type: ignore[arg-type]

        self._guard("start", start)

    def log_run(self, run_dir: Path, results: pd.DataFrame) -> None:
        if self._run is None:
            return
        if (run_dir / "events.jsonl").is_file():
            self._guard("log the time series of", lambda: self._log_series(run_dir / "events.jsonl"))
        self._guard("log the results of", lambda: self._log_results(results))
        self._guard("store the files of", lambda: self._log_files(run_dir))

    def finish(self) -> None:
        if self._run is None:
            return
        run, failed = self._run, self.error is not None

        def end() -> None:
            self._run = None
            run.finish(exit_code=1 if failed else 0)

        self._guard("finish", end)

    def _log_series(self, events: Path) -> None:
        samples = read_events(events).get("sample")
        if samples is None:
            return
        values = [name for name in samples.columns if name not in SERIES]
        for (phase, strategy, workload, repetition), rows in samples.groupby(list(SERIES), sort=False):
            prefix = f"{phase}/{strategy}/{workload}.{repetition}"
            self._run.define_metric(f"{prefix}/time_s", hidden=True)
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/time_s", summary="none")
            stride = -(-len(rows) // MAX_POINTS)
            for row in rows[values].iloc[::stride].to_dict("records"):
                self._run.log({f"{prefix}/{name}": value for name, value in row.items()})

    def _log_results(self, results: pd.DataFrame) -> None:
        import wandb

        # Object columns of mixed or missing values are shown as text: W&B's tables want one type per column.
        results = named_sets(results)
        plain = results.copy()
        for name in plain.columns:
            if not pd.api.types.is_numeric_dtype(plain[name]):
                plain[name] = plain[name].map(lambda value: "" if pd.isna(value) else str(value))
        self._run.log({"results": wandb.Table(dataframe=plain)})
        numbers = [name for name in results.select_dtypes("number").columns if name not in SERIES]
        for row in results.to_dict("records"):
            prefix = f"{row['phase']}/{row['strategy']}/{row['workload']}.{row['repetition']}"
            found = {f"{prefix}/{name}": row[name] for name in numbers if pd.notna(row[name])}
            self._run.summary.update(found)

    def _log_files(self, run_dir: Path) -> None:
        import wandb

        if (run_dir / "environment.json").is_file():  # still open: the run adds its duration at the very end
            environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
            self._run.config.update({"environment": environment})
        # "immutable": take the files where they are instead of copying them to a folder in the user's home.
        artifact = wandb.Artifact(name=f"run-{self._run.id}", type="run")
        files = [run_dir / name for name in ARTIFACT_FILES] + sorted((run_dir / "figures").glob("*"))
        for file in files:
            if file.is_file():
                artifact.add_file(str(file), name=str(file.relative_to(run_dir)), policy="immutable")
        self._run.log_artifact(artifact)

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        """Run one call to W&B. Where it fails, say so once and go quiet: the run's own files are complete without it."""
        try:
            call()
        except Exception as error:
            self.error = self.error or error
            text = " ".join(str(error).split()) or type(error).__name__
            LOG.warning("tracking could not %s the run (%s); its records are complete in %s", what, text, self.run_dir)


def make_tracker(tracking: Mapping[str, Any], run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker that a configuration asks for.

    Args:
        tracking: fields of ``conf/tracking/``; ``group`` defaults to the experiment, ``job_type`` to the model.
        run_dir: the run directory.
        config: the whole configuration, resolved to plain values.

    Raises:
        UserError: an unknown mode.
    """
    mode = tracking["mode"]
    if mode not in MODES:
        raise bad("tracking.mode", mode, f"choose one of {', '.join(MODES)}")
    if mode == "disabled":
        return Tracker()
    model = config.get("model")
    options = {
        "project": tracking.get("project") or "hybridcache",
        "entity": tracking.get("entity"),
        "group": tracking.get("group") or config.get("experiment_name"),
        "job_type": tracking.get("job_type") or (model.get("name") if isinstance(model, Mapping) else None),
        "tags": [str(tag) for tag in tracking.get("tags") or ()] or None,
        "dir": str(tracking.get("dir") or run_dir),
    }
    return WandbTracker(mode, run_dir, config, **options)
