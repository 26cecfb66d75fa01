"""Figures of speed: throughput, latency, and where the time of a step goes.

Each returns a figure and the data that it shows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hybridcache.observe.report import style
from hybridcache.observe.report.comparison import BY_COLUMN, clock_means_nothing, compare, is_bound, label
from hybridcache.observe.report.load import NoData, Run
from hybridcache.observe.report.style import Drawn
from hybridcache.observe.report.units import number_text, seconds_text

MAX_TITLE_WORKLOADS = 2
"""Workloads that the throughput's title speaks of; a longer title would not be read."""

UNRANKED = "wall clock of a CPU, not ranked"
QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
BARS = ("output_tokens_per_s", "preemptions", "recomputed_tokens_preemption")
BARS_IF_ANY = ("recomputed_tokens_failure", "requests_refused")

PART_COLORS: dict[str, str] = style.LOOK["parts"]
"""Colour by class of kernel, in drawing order."""
OTHER_PART = "#882255"


@style.styled()
def throughput(run: Run, phase: str) -> Drawn:
    """Output tokens per second, with preemptions, recomputed tokens and refusals beside it."""
    rows = run.rows(phase)
    missing = [name for name in BARS if name not in rows.columns]
    if missing or rows["output_tokens_per_s"].isna().all():
        raise NoData(f"results of {phase} have no {', '.join(missing) or 'output_tokens_per_s'}")
    columns = [*BARS, *(name for name in BARS_IF_ANY if name in rows.columns and rows[name].any())]
    data = rows[["workload", "strategy", "repetition", *columns]].dropna(subset="output_tokens_per_s")
    names, workloads = run.present(data), list(dict.fromkeys(data["workload"]))
    figure = style.new_figure(0.9 + (0.45 + 0.27 * len(names)) * len(workloads))
    ratios = (1.5, *[1.0] * (len(columns) - 1))
    grid = figure.subplots(len(workloads), len(columns), sharey=True, squeeze=False, width_ratios=ratios)
    for line, workload in zip(grid, workloads):
        of_workload = data[data["workload"] == workload].groupby("strategy")
        for axes, column in zip(line, columns):
            values = {name: of_workload.get_group(name)[column] for name in names if name in of_workload.groups}
            _bars(axes, [values.get(name, pd.Series(dtype=float)) for name in names], names, run)
            title = BY_COLUMN[column].heading
            axes.set_title(f"{workload}: {title}" if axes is line[0] else title, loc="left")
        line[0].set_yticks(range(len(names)), [label(name) for name in names])
        line[0].set_ylim(len(names) - 0.45, -0.55)
    compared = {workload: compare(run, phase, workload) for workload in workloads}
    verdicts = {workload: found.judge(BY_COLUMN["output_tokens_per_s"]) for workload, found in compared.items()}
    parts = [f"{workload}: {found.words()}" for workload, found in verdicts.items() if found]
    text = UNRANKED if clock_means_nothing(run, phase) else "; ".join(parts[:MAX_TITLE_WORKLOADS])
    style.set_title(figure, f"{phase}, output tokens/s. {text}")
    return figure, data


@style.styled()
def latency(run: Run, phase: str, workload: str) -> Drawn:
    """Time to the first token and per output token: p25 to p75 as a bar, p5 to p95 as a line, p50 and p99 marked."""
    events = run.select("request", phase, workload)
    if events.empty or events["ttft_s"].isna().all():
        what = "request events of" if events.empty else "first token in"
        raise NoData(f"no {what} {phase}, {workload}")
    data = _percentiles(events)
    names, styles = run.present(data), style.strategy_styles(run.strategies)
    figure = style.new_figure(1.5 + 0.34 * len(names))
    grid = figure.subplots(1, 2, sharey=True)
    texts = {"ttft_s": "time to first token (TTFT)", "tpot_s": "time per output token (TPOT)"}
    for axes, (metric, text) in zip(grid, texts.items()):
        rows = data[data["metric"] == metric].set_index("strategy")
        axes.set_title(text, loc="left")
        if rows.empty or rows["p05"].min() <= 0:
            absent = "no request with a second token" if rows.empty else "times of zero"
            axes.text(0.5, 0.5, absent, ha="center", transform=axes.transAxes)
            continue
        for i, name in enumerate(names):
            if name in rows.index:
                _box(axes, i, rows.loc[name], styles[name][0])
        style.log_axis(axes, rows["p05"].min(), rows["p99"].max(), FuncFormatter(lambda value, _: seconds_text(value)))
        axes.set_xlabel("time (log scale)")
    grid[0].set_yticks(range(len(names)), [label(name) for name in names])
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    unranked = clock_means_nothing(run, phase)
    verdict = None if unranked else compare(run, phase, workload).judge(BY_COLUMN["ttft_p50_s"])
    text = verdict.words() if verdict else UNRANKED if unranked else "not ranked"
    style.set_title(figure, f"{phase}, {workload}: median TTFT: {text}")
    return figure, data


@style.styled()
def step_profile(run: Run, phase: str) -> Drawn:
    """One bar a profiled step, cut by class of kernel; a bar's length is the whole step.

    Raises:
        NoData: the run has no profile.
    """
    events = run.events.get("step_profile")
    if events is None or not (events["phase"] == phase).any():
        raise NoData(f"no step of {phase} was profiled")
    data = events[events["phase"] == phase][["strategy", "workload", "part", "seconds", "launches"]]
    steps = list(dict.fromkeys(data["workload"]))
    figure = style.new_figure(1.0 + 1.05 * len(steps))
    words: list[str] = []
    handles: dict[str, Any] = {}
    for axes, step in zip(figure.subplots(len(steps), 1, squeeze=False)[:, 0], steps):
        parts = data[data["workload"] == step].set_index("part")["seconds"]
        total, left = parts.sum(), 0.0
        for name in sorted(parts.index, key=lambda name: [*PART_COLORS, name].index(name)):
            color, value = PART_COLORS.get(name, OTHER_PART), 1e3 * parts[name]
            handles.setdefault(name, axes.barh(0, value, left=left, color=color, edgecolor="white", linewidth=0.6))
            if parts[name] > 0.045 * total:
                place = {"ha": "center", "va": "center", "fontsize": 8, "color": style.text_on(color)}
                axes.text(left + value / 2, 0, f"{parts[name] / total:.0%}", **place)
            left += value
        axes.set(xlim=(0, 1e3 * total), yticks=[], xlabel="milliseconds" if step == steps[-1] else "")
        axes.grid(visible=False)
        axes.set_title(f"{step}: {seconds_text(total)} a step", loc="left")
        biggest, share = str(parts.idxmax()), parts.max() / total
        words.append(f"{step.split(':')[0]} {seconds_text(total)}, most of it {biggest} ({share:.0%})")
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6)
    style.set_title(figure, f"One step: {'; '.join(words)}")
    return figure, data


def _percentiles(events: pd.DataFrame) -> pd.DataFrame:
    times = ["ttft_s", "tpot_s"]
    values = events.melt("strategy", times, var_name="metric", value_name="seconds").dropna()
    groups = values.astype({"seconds": float}).groupby(["strategy", "metric"], sort=False)["seconds"]
    found = groups.quantile(list(QUANTILES.values())).unstack().set_axis(list(QUANTILES), axis=1)
    found.insert(0, "requests", groups.size())
    return found.reset_index()


def _bars(axes: Axes, values: Sequence[pd.Series], names: Sequence[str], run: Run) -> None:
    styles = style.strategy_styles(run.strategies)
    top = max((found.max() for found in values if len(found)), default=0) or 1
    for i, (name, found) in enumerate(zip(names, values)):
        if found.empty:
            continue
        spread = float(found.std()) if len(found) > 1 else 0.0
        error: dict[str, Any] = (
            {"xerr": spread, "error_kw": {"ecolor": "#222222", "elinewidth": 1.1, "capsize": 2.5}} if spread else {}
        )
        bars = axes.barh(i, found.mean(), height=0.66, color=styles[name][0], **error)
        if is_bound(name):
            bars[0].set(hatch="////", edgecolor="white")
        if spread:
            axes.plot(found, [i] * len(found), "o", markersize=3, color="#222222", markeredgecolor="white", zorder=3)
        end = max(found.max(), found.mean() + spread)
        axes.text(end + 0.025 * top, i, number_text(found.mean()), va="center", fontsize=8.5, color="#333333")
    axes.set_xlim(0, top * 1.25)
    whole = all((found == np.round(found)).all() for found in values)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _box(axes: Axes, i: int, row: pd.Series, color: str) -> None:
    axes.plot([row["p05"], row["p95"]], [i, i], color=color, linewidth=1.6, solid_capstyle="butt")
    axes.barh(i, row["p75"] - row["p25"], left=row["p25"], height=0.5, color=color)
    axes.plot([row["p50"]] * 2, [i - 0.25, i + 0.25], color="white", linewidth=2.2)
    axes.plot([row["p99"]], [i], marker="|", markersize=9, markeredgewidth=1.8, color=color)
