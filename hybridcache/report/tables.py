"""Tables of the report: results by phase, and who did best."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hybridcache.report.load import Run
from hybridcache.report.style import competitors, label, number_text, seconds_text

CLOSE = 0.01
"""Strategies within this fraction of the best are named beside it."""


def _percent(value: float) -> str:
    return f"{value:.1%}"


@dataclass(frozen=True)
class Metric:
    """A column of results: its heading, its text, and whether more (+1) or less (-1) is better (0: neither)."""

    column: str
    heading: str
    text: Callable[[float], str]
    better: int


METRICS = (
    Metric("output_tokens_per_s", "output tokens/s", number_text, +1),
    Metric("residents_peak", "residents, peak", number_text, +1),
    Metric("utilization_mean", "utilization", _percent, +1),
    Metric("preemptions", "preemptions", number_text, -1),
    Metric("recomputed_tokens", "recomputed tokens", number_text, -1),
    Metric("ttft_p50_s", "TTFT p50", seconds_text, -1),
    Metric("ttft_p99_s", "TTFT p99", seconds_text, -1),
    Metric("tpot_p50_s", "TPOT p50", seconds_text, -1),
    Metric("duration_s", "duration", seconds_text, -1),
)
HIGHLIGHTS = ("output_tokens_per_s", "ttft_p50_s", "utilization_mean")


@dataclass(frozen=True)
class Table:
    """Cells are ``(text, is best)``."""

    title: str
    headings: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]


@dataclass(frozen=True)
class Highlight:
    """One metric's best: ``note`` compares it with the rest."""

    title: str
    strategies: str
    value: str
    note: str


def capacity_table(run: Run) -> Table | None:
    """Residents by strategy and length; None where the run has no such phase."""
    rows = run.rows("capacity")
    if rows.empty or "residents_peak" not in rows.columns:
        return None
    found = rows.pivot_table(index="strategy", columns="workload", values="residents_peak", sort=False)
    found = found.reindex([name for name in run.strategies if name in found.index])
    best = found.loc[competitors(list(found.index))].max()
    return Table(
        title="Residents by request length",
        headings=[name.replace("length=", "") + " tokens" for name in found.columns],
        rows=[
            (label(name), [(number_text(value), value == best[column]) for column, value in row.items()])
            for name, row in found.iterrows()
        ],
    )


def serving_table(run: Run, phase: str, workload: str) -> Table:
    """Means over repetitions of every metric that the results have."""
    means = _means(run, phase, workload)
    shown = [metric for metric in METRICS if metric.column in means.columns]
    best = {
        metric.column: _best(means.loc[competitors(list(means.index)), metric.column], metric.better)
        for metric in shown
    }
    repetitions = run.rows(phase).query("workload == @workload")["repetition"].nunique()
    return Table(
        title=workload + (f" (means of {repetitions} repetitions)" if repetitions > 1 else ""),
        headings=[metric.heading for metric in shown],
        rows=[
            (label(name), [_cell(row[metric.column], metric, best[metric.column]) for metric in shown])
            for name, row in means.iterrows()
        ],
    )


def highlights(run: Run) -> list[Highlight]:
    """The best by metric, the bound left out."""
    found = []
    for column, residents in _capacity_columns(run).items():
        title = f"capacity: most residents of {column.replace('length=', '')} tokens"
        found.append(_highlight(title, residents, METRICS[1]))
    for phase in run.phases:
        if phase == "capacity":
            continue
        for workload in run.workloads(phase):
            means = _means(run, phase, workload)
            for metric in METRICS:
                if metric.column in HIGHLIGHTS and metric.column in means.columns:
                    word = "highest" if metric.better > 0 else "lowest"
                    title = f"{phase}, {workload}: {word} {metric.heading}"
                    found.append(_highlight(title, means[metric.column], metric))
    return [highlight for highlight in found if highlight is not None]


def token_agreement(run: Run, phase: str, workload: str) -> str | None:
    """Whether all strategies sampled the same tokens; None where the results carry no hash of them."""
    rows = run.rows(phase).query("workload == @workload")
    if "tokens_sha256" not in rows.columns or not rows["tokens_sha256"].notna().any():
        return None
    rows = rows[rows["tokens_sha256"].notna()]
    count = rows["strategy"].nunique()
    if count == 1:
        return None
    if (rows.groupby("repetition")["tokens_sha256"].nunique() == 1).all():
        return f"All {count} strategies sampled the same tokens (SHA-256 {rows['tokens_sha256'].iloc[0][:12]})."
    return (
        f"The {count} strategies did not all sample the same tokens: batches of different shape round differently in "
        "float32 and bfloat16, and near-ties flip. Hashes are in results.parquet."
    )


def _means(run: Run, phase: str, workload: str) -> pd.DataFrame:
    rows = run.rows(phase).query("workload == @workload")
    columns = [
        metric.column for metric in METRICS if metric.column in rows.columns and rows[metric.column].notna().any()
    ]
    means = rows.groupby("strategy")[columns].mean()
    return means.reindex([name for name in run.strategies if name in means.index])


def _capacity_columns(run: Run) -> dict[str, pd.Series]:
    """Residents at the shortest and the longest request of the capacity phase."""
    rows = run.rows("capacity")
    if rows.empty or "residents_peak" not in rows.columns:
        return {}
    workloads = list(dict.fromkeys(rows["workload"]))
    ends = dict.fromkeys((workloads[0], workloads[-1]))
    return {
        name: rows[rows["workload"] == name].groupby("strategy", sort=False)["residents_peak"].mean() for name in ends
    }


def _best(values: pd.Series, better: int) -> float:
    values = values.dropna()
    if values.empty or better == 0 or values.nunique() == 1:
        return np.nan
    return values.max() if better > 0 else values.min()


def _cell(value: float, metric: Metric, best: float) -> tuple[str, bool]:
    return ("" if pd.isna(value) else metric.text(value), bool(value == best))


def _highlight(title: str, values: pd.Series, metric: Metric) -> Highlight | None:
    contest = values.loc[competitors(list(values.index))].dropna()
    if contest.empty:
        return None
    order = contest.sort_values(ascending=metric.better < 0, kind="stable")
    best, worst = order.iloc[0], order.iloc[-1]
    tied = [name for name, value in order.items() if value == best]
    close = [name for name, value in order.items() if value != best and abs(value - best) <= CLOSE * abs(best)]
    notes = []
    if len(tied) == len(order) > 1:
        notes.append("all strategies alike")
    elif len(order) > 1:
        if close:
            notes.append(f"within 1 %: {', '.join(close)}")
        ratio = max(best, worst) / min(best, worst) if min(best, worst) > 0 else np.inf
        if np.isfinite(ratio):
            notes.append(
                f"{ratio:.2f}x {'more' if metric.better > 0 else 'less'} than {order.index[-1]} ({metric.text(worst)})"
            )
    shown = ", ".join(tied) if len(tied) <= 3 else f"{len(tied)} of {len(order)} strategies"
    return Highlight(title=title, strategies=shown, value=metric.text(best), note="; ".join(notes))
