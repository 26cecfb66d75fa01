"""Run: what one run directory holds, as tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hybridcache.errors import UserError, bad
from hybridcache.observe.events import read_events

REQUIRED_COLUMNS = ("phase", "strategy", "workload", "repetition")
SERVING_PHASES = ("simulation", "inference")
"""Phases that serve requests over time (the ``capacity`` phase only counts them)."""


def set_name(strategy: str, policy: object) -> str:
    """A strategy under one of several policies, in figures and tables; without a policy, the strategy."""
    return f"{strategy} ({policy})" if isinstance(policy, str) else strategy


def named_sets(results: pd.DataFrame) -> pd.DataFrame:
    """Results whose strategies are told apart by their policy too, where they have one."""
    if "policy" not in results.columns:
        return results
    return results.assign(strategy=[set_name(*pair) for pair in zip(results["strategy"], results["policy"])])


class NoData(Exception):
    """The run holds nothing for this figure; the message says what is missing."""


@dataclass(frozen=True)
class Run:
    """One finished run: its results (a row per phase, strategy, workload and repetition), tables of its events by type, its
    resolved configuration, its environment, and the run directory."""

    results: pd.DataFrame
    events: Mapping[str, pd.DataFrame]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    path: Path
    absent: tuple[str, ...] = ()
    """Files of a complete run that this one lacks; their field is empty."""

    @property
    def strategies(self) -> list[str]:
        """Names in the order in which the run took them; the order of every figure and table."""
        return list(dict.fromkeys(self.results["strategy"]))

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(self.results["phase"]))

    def workloads(self, phase: str) -> list[str]:
        return list(dict.fromkeys(self.rows(phase)["workload"]))

    def rows(self, phase: str, workload: str | None = None) -> pd.DataFrame:
        """Results of one phase, or of one workload of it."""
        chosen = self.results["phase"] == phase
        return self.results[chosen if workload is None else chosen & (self.results["workload"] == workload)]

    def select(self, event: str, phase: str, workload: str) -> pd.DataFrame:
        """Events of one type, phase and workload, all repetitions; an empty table where there are none."""
        found = self.events.get(event)
        if found is None or not {"phase", "workload"} <= set(found.columns):
            return pd.DataFrame()
        return found[(found["phase"] == phase) & (found["workload"] == workload)]

    def by_length(self, event: str) -> pd.DataFrame:
        """Events of the capacity phase, one row per strategy and length.

        Raises:
            NoData: there are none.
        """
        found = self.events.get(event)
        if found is None or found.empty:
            raise NoData(f"no {event} events (the capacity phase writes them)")
        return found.drop_duplicates(["strategy", "length"], keep="last").reset_index(drop=True)

    def over_time(self, event: str, phase: str, workload: str, columns: Sequence[str]) -> pd.DataFrame:
        """Events over time of the first repetition, by strategy and step.

        Raises:
            NoData: there are none, or they lack a column.
        """
        found = self.select(event, phase, workload)
        missing = [name for name in columns if name not in found.columns]
        if found.empty:
            raise NoData(f"no {event} events of {phase}, {workload}")
        if missing:
            raise NoData(
                f"{event} events of {phase}, {workload} lack {', '.join(missing)}: they are of an older version"
            )
        found = found[found["repetition"] == found["repetition"].min()].sort_values(["strategy", "step"], kind="stable")
        return found[["strategy", "step", *columns]].reset_index(drop=True)

    def means(self, phase: str, workload: str, column: str) -> pd.Series:
        """Means over repetitions by strategy, as the tables have them; empty where the results lack the column."""
        rows = self.rows(phase, workload)
        return rows.groupby("strategy")[column].mean() if column in rows.columns else pd.Series(dtype=float)

    def present(self, data: pd.DataFrame) -> list[str]:
        """Strategies of ``data`` in the order of the run."""
        found = set(data["strategy"])
        return [name for name in self.strategies if name in found] + sorted(found - set(self.strategies))


def load_run(run_dir: str | PathLike[str]) -> Run:
    """Read a run directory. ``results.parquet`` must be there; what else is absent is named in ``Run.absent``.

    Raises:
        UserError: no such directory, no results, results without the columns that name a row, or a file that does not
            parse.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise bad("run_dir", str(run_dir), "is no directory; give the output directory of a run")
    results = _results(path)
    absent = tuple(name for name in ("events.jsonl", "config.yaml", "environment.json") if not (path / name).is_file())
    return Run(
        results=results,
        events={} if "events.jsonl" in absent else read_events(path / "events.jsonl"),
        config={} if "config.yaml" in absent else _mapping(path / "config.yaml"),
        environment={} if "environment.json" in absent else _mapping(path / "environment.json"),
        path=path,
        absent=absent,
    )


def _results(path: Path) -> pd.DataFrame:
    file = path / "results.parquet"
    if not file.is_file():
        raise bad("run_dir", str(path), "has no results.parquet; give the directory of a run that finished")
    try:
        results = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a parquet table ({error})") from error
    missing = [name for name in REQUIRED_COLUMNS if name not in results.columns]
    if missing:
        raise UserError(f"{file}: lacks {', '.join(missing)}; the report needs a run that compares strategies")
    if results.empty:
        raise UserError(f"{file}: holds no row, so there is nothing to report")
    return named_sets(results)


def _mapping(file: Path) -> Mapping[str, Any]:
    text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: does not parse ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a mapping of names to values")
    return found
