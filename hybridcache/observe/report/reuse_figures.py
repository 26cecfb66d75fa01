"""Prefix reuse: what was found, how soon second turns begin, and whose bytes those are; as a figure and as a table."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hybridcache.observe.report import style
from hybridcache.observe.report.comparison import is_bound, label
from hybridcache.observe.report.load import NoData, Run
from hybridcache.observe.report.page import Section
from hybridcache.observe.report.style import Drawn
from hybridcache.observe.report.units import byte_unit, percent_text, seconds_text

BYTES = {"held_bytes_mean": "live", "cached_bytes_mean": "cached", "host_bytes_mean": "host"}
COLORS = dict(zip(BYTES.values(), ("#0072B2", "#E69F00", "#999999")))


def has_rounds(run: Run, phase: str) -> bool:
    """Whether a phase served its requests in rounds, with a row of results each."""
    rows = run.rows(phase)
    return "round" in rows.columns and bool(rows["round"].notna().any())


def reuse_data(run: Run, phase: str) -> pd.DataFrame:
    """A row a strategy, workload and repetition: ``hit_rate`` (of rounds behind the first, where there are several),
    ``second_turn_s`` (median TTFT of second turns) and mean bytes by kind, as far as the results tell.

    Raises:
        NoData: the results tell of no hits.
    """
    rows = run.rows(phase)
    if not {"hit_rate", "policy"} <= set(rows.columns) or rows["hit_rate"].isna().all():
        raise NoData(f"results of {phase} have no hit_rate by policy")
    keys = ["workload", "strategy", "repetition"]
    if not has_rounds(run, phase):
        names = {"ttft_turn2_p50_s": "second_turn_s"}
        return rows.rename(columns=names)[
            [name for name in (*keys, "hit_rate", "second_turn_s", *BYTES) if name in rows.rename(columns=names)]
        ]
    rows = rows[rows["hit_tokens"].notna() & rows["round"].notna()]
    later = rows[(rows["round"] > 1) | (rows.groupby("workload")["round"].transform("max") == 1)]
    sums = later.groupby(keys, sort=False)[["hit_tokens", "prompt_tokens"]].sum()
    found = (sums["hit_tokens"] / sums["prompt_tokens"]).rename("hit_rate").to_frame()
    second = rows[rows["round"] == 2].set_index(keys)["ttft_p50_s"]
    return found.join(second.rename("second_turn_s")).reset_index()


@style.styled()
def reuse(run: Run, phase: str) -> Drawn:
    """Hit rate, TTFT of second turns and bytes by kind, a bar a strategy and policy and a line of panels a workload.

    Raises:
        NoData: the results tell of no hits.
    """
    data = reuse_data(run, phase)
    columns = [name for name in ("hit_rate", "second_turn_s") if name in data and data[name].notna().any()]
    kinds = [name for name in BYTES if name in data and data[name].any()]
    names, workloads = run.present(data), list(dict.fromkeys(data["workload"]))
    wide = len(columns) + bool(kinds)
    figure = style.new_figure(1.1 + (0.5 + 0.25 * len(names)) * len(workloads))
    grid = figure.subplots(len(workloads), wide, sharey=True, squeeze=False)
    styles = style.strategy_styles(run.strategies)
    texts = {"hit_rate": ("hit rate", percent_text), "second_turn_s": ("TTFT of second turns", seconds_text)}
    for line, workload in zip(grid, workloads):
        groups = data[data["workload"] == workload].groupby("strategy", sort=False)
        for axes, column in zip(line, columns):
            heading, text = texts[column]
            means, spreads = groups[column].mean(), groups[column].std().fillna(0.0)
            top = float((means + spreads).fillna(0.0).max()) or 1.0
            for i, name in enumerate(names):
                if name in means.index and not np.isnan(means[name]):
                    hatch = {"hatch": "////", "edgecolor": "white"} if is_bound(name) else {}
                    error = {"xerr": spreads[name]} if spreads[name] else {}
                    axes.barh(i, means[name], height=0.66, color=styles[name][0], **hatch, **error)
                    axes.text(means[name] + spreads[name] + 0.02 * top, i, text(means[name]), va="center", fontsize=8)
            _axis(axes, top, text, f"{workload}: {heading}" if axes is line[0] else heading)
        if kinds:
            _stack(line[-1], groups[kinds].mean(), names)
        line[0].set_yticks(range(len(names)), [label(name) for name in names])
        line[0].set_ylim(len(names) - 0.45, -0.55)
    means = data[data["workload"] == workloads[0]].groupby("strategy")["hit_rate"].mean()
    best = means[[name for name in means.index if not is_bound(name)] or list(means.index)]
    title = f"{phase}, {workloads[0]}: hit rate {percent_text(best.max())} under {best.idxmax()}"
    style.set_title(figure, f"{title}, {percent_text(best.min())} under {best.idxmin()}")
    return figure, data


def _stack(axes: Axes, means: pd.DataFrame, names: list[str]) -> None:
    """Mean bytes by kind."""
    top = float(means.sum(axis=1).max()) or 1.0
    divisor, unit = byte_unit(top)
    for i, name in enumerate(names):
        left = 0.0
        for column in means.columns if name in means.index else ():
            value = means.at[name, column] / divisor
            axes.barh(
                i, value, left=left, height=0.66, color=COLORS[BYTES[column]], label=BYTES[column] if i == 0 else None
            )
            left += value
    _axis(axes, top / divisor, lambda value: f"{value:.3g}", f"bytes by kind, {unit}")
    axes.legend(fontsize=7, loc="lower right")


def _axis(axes: Axes, top: float, text: object, title: str) -> None:
    axes.set_xlim(0, 1.25 * top)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))  # type: ignore[operator]
    axes.grid(visible=False, axis="y")
    axes.set_title(title, loc="left")


def rounds_table(run: Run, phase: str) -> Section:
    """A line a workload, strategy and policy: seconds of each round, hit rate, and TTFT of second turns."""
    rows, data = run.rows(phase), reuse_data(run, phase)
    found = data.groupby(["workload", "strategy"]).mean(numeric_only=True)
    seconds = rows.pivot_table(index=["workload", "strategy"], columns="round", values="seconds", sort=False)
    lines = []
    for (workload, name), times in seconds.iterrows():
        known = found.loc[(workload, name)] if (workload, name) in found.index else pd.Series(dtype=float)
        rest = (("hit_rate", percent_text), ("second_turn_s", seconds_text))
        values = [(value, seconds_text) for value in times] + [(known.get(column), text) for column, text in rest]
        lines.append([workload, label(name), *("" if pd.isna(value) else text(value) for value, text in values)])
    return Section(
        f"{phase.capitalize()}: rounds",
        headings=[
            "workload",
            "strategy",
            *(f"round {n:.0f}" for n in seconds.columns),
            "hit rate",
            "TTFT of second turns",
        ],
        rows=lines,
    )
