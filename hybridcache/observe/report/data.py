"""What a figure shows: the rows it draws, picked from a run."""

import numpy as np
import pandas as pd

from hybridcache.observe.report.load import Run


class NoData(Exception):
    """The run holds nothing for this figure; the message says what is missing."""


def lengths(run: Run, event: str) -> pd.DataFrame:
    """Events of the capacity phase, one row per strategy and length."""
    found = run.events.get(event)
    if found is None or found.empty:
        raise NoData(f"no {event} events (the capacity phase writes them)")
    return found.drop_duplicates(["strategy", "length"], keep="last").reset_index(drop=True)


def series(run: Run, event: str, phase: str, workload: str) -> pd.DataFrame:
    """Events over time of the first repetition."""
    found = run.select(event, phase, workload)
    if found.empty:
        raise NoData(f"no {event} events of {phase}, {workload}")
    return found[found["repetition"] == found["repetition"].min()].sort_values(["strategy", "step"], kind="stable")


def present(run: Run, data: pd.DataFrame) -> list[str]:
    found = set(data["strategy"])
    return [name for name in run.strategies if name in found] + sorted(found - set(run.strategies))


def time_mean(rows: pd.DataFrame, column: str) -> float:
    """Mean over time of a series that keeps each value until the next sample."""
    durations = np.diff(rows["time_s"], append=rows["time_s"].iloc[-1])
    return float(np.average(rows[column], weights=durations)) if durations.sum() > 0 else float(rows[column].mean())


def edges(times: np.ndarray) -> np.ndarray:
    """Column borders of a map: each moment lasts until the next, the last one as long as the one before."""
    last = times[-1] - times[-2] if len(times) > 1 and times[-1] > times[-2] else 1.0
    return np.append(times, times[-1] + last)


def percentiles(events: pd.DataFrame) -> pd.DataFrame:
    quantiles = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
    rows = []
    for strategy, group in events.groupby("strategy", sort=False):
        for metric in ("ttft_s", "tpot_s"):
            values = pd.to_numeric(group[metric]).dropna()
            if len(values):
                found = {name: values.quantile(q) for name, q in quantiles.items()}
                rows.append({"strategy": strategy, "metric": metric, "requests": len(values), **found})
    return pd.DataFrame(rows, columns=["strategy", "metric", "requests", *quantiles])
