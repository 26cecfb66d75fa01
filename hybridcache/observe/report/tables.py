"""Tables of the report: results by phase, and who did best."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from hybridcache.observe.report.load import Run
from hybridcache.observe.report.words import BOUND, bytes_text, competitors, label, number_text, seconds_text

CLOSE = 0.01
"""Strategies within this fraction of the best are named beside it."""


def _percent(value: float) -> str:
    return f"{value:.1%}"


@dataclass(frozen=True)
class Metric:
    """A column of results: its heading, its text, and whether more (+1) or less (-1) is better."""

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
TIMES = ("output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "duration_s")
HIGHLIGHTS = ("output_tokens_per_s", "utilization_mean", "ttft_p50_s", "tpot_p50_s")


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
    contest = found.loc[competitors(list(found.index))]
    best = {column: _best(contest[column], METRICS[1]) for column in found.columns}
    return Table(
        title="Residents by request length",
        headings=[_length(name) for name in found.columns],
        rows=[
            (label(name), [_cell(value, METRICS[1], best[column], name) for column, value in row.items()])
            for name, row in found.iterrows()
        ],
    )


def serving_table(run: Run, phase: str, workload: str) -> Table:
    """Means over repetitions of every metric that the results have."""
    means = _means(run, phase, workload)
    shown = [metric for metric in METRICS if metric.column in means.columns]
    contest = means.loc[competitors(list(means.index))]
    unranked = TIMES if times_mean_nothing(run, phase) else ()
    best = {metric.column: _best(contest[metric.column], metric) for metric in shown if metric.column not in unranked}
    repetitions = run.rows(phase).query("workload == @workload")["repetition"].nunique()
    return Table(
        title=workload + (f" (means of {repetitions} repetitions)" if repetitions > 1 else ""),
        headings=[metric.heading for metric in shown],
        rows=[
            (label(name), [_cell(row[metric.column], metric, best.get(metric.column), name) for metric in shown])
            for name, row in means.iterrows()
        ],
    )


def conditions(run: Run, phase: str) -> str:
    """What a phase ran with, as its rows say: model, device, backend, budget."""
    rows = run.rows(phase)
    found = []
    for column in ("model", "device", "backend"):
        if column in rows.columns and rows[column].notna().any():
            found.append(f"{column} {', '.join(dict.fromkeys(rows[column].dropna().astype(str)))}")
    if "budget_bytes" in rows.columns and rows["budget_bytes"].notna().any():
        found.append(f"budget {', '.join(dict.fromkeys(map(bytes_text, rows['budget_bytes'].dropna())))}")
    return " · ".join(found)


def times_mean_nothing(run: Run, phase: str) -> bool:
    """Whether a phase's times are wall-clock of a CPU, which rank nothing: the host decides, not the strategy."""
    rows = run.rows(phase)
    return phase == "inference" and "device" in rows.columns and set(rows["device"].dropna()) == {"cpu"}


def highlights(run: Run) -> tuple[list[Highlight], list[str]]:
    """The best by metric, the bound left out; and the metrics in which all strategies are alike.

    Wall-clock times of a CPU are not ranked.
    """
    found: list[Highlight] = []
    alike: list[str] = []
    for title, values, metric in _contests(run):
        contest = values.loc[competitors(list(values.index))].dropna()
        if contest.map(metric.text).nunique() > 1:
            found.append(_highlight(title, contest, metric))
        elif len(contest) > 1:
            alike.append(title)
    return found, alike


def _contests(run: Run) -> Iterator[tuple[str, pd.Series, Metric]]:
    for column, residents in _capacity_columns(run).items():
        yield f"capacity: most residents of {_length(column)}", residents, METRICS[1]
    for phase in run.phases:
        chosen = [name for name in HIGHLIGHTS if not (name in TIMES and times_mean_nothing(run, phase))]
        for workload in run.workloads(phase) if phase != "capacity" else ():
            means = _means(run, phase, workload)
            for metric in METRICS:
                if metric.column in chosen and metric.column in means.columns:
                    word = "highest" if metric.better > 0 else "lowest"
                    yield f"{phase}, {workload}: {word} {metric.heading}", means[metric.column], metric


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


def shortfall(run: Run, phase: str, workload: str, name: str = "shared_pool") -> str | None:
    """Where ``name`` serves more than 1 % fewer tokens a second than the best: by how much, and which of the memory's
    figures speak for the other. None where it is the best or close, where times mean nothing, or in a simulation."""
    if phase != "inference" or times_mean_nothing(run, phase):
        return None
    means = _means(run, phase, workload)
    if name not in means.index or "output_tokens_per_s" not in means.columns:
        return None
    rates = means.loc[competitors(list(means.index)), "output_tokens_per_s"].dropna()
    best = str(rates.idxmax())
    ahead = rates[best] / rates[name] - 1
    if ahead <= CLOSE:
        return None
    reasons = []
    for metric in METRICS:
        if metric.column in TIMES or metric.column not in means.columns:
            continue
        theirs, ours = means.loc[best, metric.column], means.loc[name, metric.column]
        if metric.better * (theirs - ours) > 0 and metric.text(theirs) != metric.text(ours):
            reasons.append(f"{metric.heading} {metric.text(theirs)} against {metric.text(ours)}")
    because = (
        "; ".join(reasons) or "none of the memory's figures is in its favour, so look at the spread of repetitions"
    )
    return f"{best} serves {ahead:.1%} more tokens a second than {name}: {because}."


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


def _best(values: pd.Series, metric: Metric) -> str | None:
    """The best value in words; None where all read alike."""
    values = values.dropna()
    if values.empty or values.map(metric.text).nunique() == 1:
        return None
    return metric.text(values.max() if metric.better > 0 else values.min())


def _cell(value: float, metric: Metric, best: str | None, strategy: str) -> tuple[str, bool]:
    """Text, and whether it is the best that a competitor reached, at the precision shown."""
    text = "" if pd.isna(value) else metric.text(value)
    return text, text == best and strategy != BOUND


def _highlight(title: str, contest: pd.Series, metric: Metric) -> Highlight:
    order = contest.sort_values(ascending=metric.better < 0, kind="stable")
    best, worst = order.iloc[0], order.iloc[-1]
    tied = [name for name, value in order.items() if metric.text(value) == metric.text(best)]
    close = [name for name, value in order.items() if name not in tied and abs(value - best) <= CLOSE * abs(best)]
    notes = [f"within 1 %: {', '.join(close)}"] if close else []
    factor = f" (factor {max(best, worst) / min(best, worst):.2f})" if min(best, worst) > 0 else ""
    notes.append(f"against {metric.text(worst)} under {order.index[-1]}{factor}")
    shown = ", ".join(tied) if len(tied) <= 3 else f"{len(tied)} of {len(order)} strategies"
    return Highlight(title=title, strategies=shown, value=metric.text(best), note="; ".join(notes))


def _length(workload: str) -> str:
    """``length=2000`` in words."""
    text = workload.removeprefix("length=")
    return f"{int(text):,} token{'' if text == '1' else 's'}" if text.isdigit() else workload
