"""Figures of a run. Each function draws one and returns it with the data that it shows.

Every function takes a :class:`Run` (and a phase and workload where it shows one), returns ``(figure, data)`` and raises
:class:`NoData` where the run holds nothing to draw. Titles state what is seen and are computed from the data. Series over
time show the first repetition; distributions pool all of them.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hybridcache.observe.report import style
from hybridcache.observe.report.data import NoData, edges, lengths, percentiles, present, series, time_mean
from hybridcache.observe.report.load import Run
from hybridcache.observe.report.words import (
    BOUND,
    byte_unit,
    bytes_text,
    competitors,
    contest,
    join_names,
    label,
    number_text,
    plural,
    seconds_text,
)
from hybridcache.strategies import Kind

Drawn = tuple[Figure, pd.DataFrame]
P = ParamSpec("P")

MAX_LENGTHS = 12
"""Columns of the residents' table; more lengths are thinned evenly (its data keeps them all)."""

KIND_LETTERS = str.maketrans("0123", ".SKR")
"""Pool maps in data files: free, state, KV, reserved. (Digits alone would be read back as a number.)"""

TOKENS = FuncFormatter(lambda value, _: f"{value:,.0f}")
SECONDS = FuncFormatter(lambda value, _: seconds_text(value))


def _styled(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with style.styled():
            return draw(*args, **kwargs)

    return inside


# -- capacity ----------------------------------------------------------------------------------------------------------


@_styled
def waste_by_length(run: Run) -> Drawn:
    """Bytes that one live request holds beyond its useful ones, against its length."""
    data = lengths(run, "charge")
    data["waste_bytes"] = data["held_bytes"] - data["useful_bytes"]
    names = present(run, data)
    styles = style.strategy_styles(run.strategies)
    divisor, unit = byte_unit(data["waste_bytes"].max())
    figure = style.new_figure(4.3)
    axes = figure.subplots()
    for i, name in enumerate(names):
        color, marker = styles[name]
        rows = data[data["strategy"] == name].sort_values("length")
        axes.plot(
            rows["length"],
            rows["waste_bytes"] / divisor,
            color=color,
            marker=marker if len(rows) <= 20 else None,
            markersize=8 if i % 2 == 0 else 5,
            **style.line_style(i, name),
            clip_on=False,
            label=label(name),
        )
    style.log_axis(axes, data["length"].min(), data["length"].max(), TOKENS)
    axes.set_xlabel("request length (tokens, log scale)")
    axes.set_ylabel(f"held - useful per request ({unit})")
    style.magnitude_axis(axes, (data["waste_bytes"] / divisor).to_numpy())
    figure.legend(loc="outside right center")
    shortest = data["length"].min()
    waste = data[data["length"] == shortest].set_index("strategy")["waste_bytes"]
    style.set_title(figure, f"A request of {plural(shortest, 'token')} wastes {contest(waste, bytes_text)}")
    return figure, data


@_styled
def residents_by_length(run: Run) -> Drawn:
    """How many requests of one length fit, as a table coloured by the share of the most that any strategy fits."""
    data = lengths(run, "capacity")
    table = data.pivot_table(index="strategy", columns="length", values="residents").reindex(present(run, data))
    if table.shape[1] > MAX_LENGTHS:
        table = table.iloc[:, np.unique(np.linspace(0, table.shape[1] - 1, MAX_LENGTHS).round().astype(int))]
    share = table / table.max()
    figure = style.new_figure(1.5 + 0.42 * len(table))
    axes = figure.subplots()
    low = min(0.5, float(np.nanmin(share.to_numpy())))
    colors = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#BBD8EA", "#7FB3D6"])
    image = axes.imshow(share, cmap=colors, vmin=low, vmax=1, aspect="auto")
    rivals = table.loc[competitors(list(table.index))]
    most = rivals.max()
    for i, j in np.ndindex(table.shape):
        if np.isfinite(table.iat[i, j]):
            best = table.index[i] in rivals.index and table.iat[i, j] == most.iat[j]
            weight = "bold" if best else "normal"
            axes.text(j, i, f"{table.iat[i, j]:,.0f}", ha="center", va="center", fontweight=weight, color="#111111")
    axes.set_xticks(range(table.shape[1]), [f"{length:,}" for length in table.columns])
    axes.set_yticks(range(len(table)), [label(name) for name in table.index])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("request length (tokens)")
    figure.colorbar(image, ax=axes, format=lambda v, _: f"{v:.0%}", pad=0.01, label="share of the most", shrink=0.95)
    wins = (rivals == most).sum(axis=1)
    champions = join_names(list(wins.index[wins == wins.max()]))
    budget = bytes_text(data["budget_bytes"].max())
    if len(rivals) == 1:
        text = f"{most.iat[0]:,.0f} requests of {plural(table.columns[0], 'token')} fit in {budget} under {champions}"
    else:
        text = f"Most requests in {budget} at {wins.max()} of {table.shape[1]} lengths: {champions}"
    style.set_title(figure, text)
    return figure, data


# -- memory over time --------------------------------------------------------------------------------------------------


@_styled
def memory_over_time(run: Run, phase: str, workload: str) -> Drawn:
    """The budget over time, stacked by what its bytes do; one panel per strategy."""
    kinds = list(style.MEMORY_COLORS)
    columns = [f"{kind}_bytes" for kind in kinds]
    data = series(run, "sample", phase, workload)[["strategy", "step", "time_s", *columns]]
    names = present(run, data)
    budget = data[columns].sum(axis=1).max()
    divisor, unit = byte_unit(budget)
    figure = style.new_figure(0.9 + 2.1 * style.panel_rows(len(names)))
    mean_useful = {}
    for axes, name in zip(style.panels(figure, len(names), "time (s)"), names):
        rows = data[data["strategy"] == name]
        layers = [rows[column] / divisor for column in columns]
        axes.stackplot(rows["time_s"], layers, colors=list(style.MEMORY_COLORS.values()), step="post", linewidth=0)
        axes.set_ylim(0, budget / divisor)
        axes.margins(x=0)
        mean_useful[name] = time_mean(rows, "useful_bytes") / budget
        style.panel_title(axes, name, f"useful {mean_useful[name]:.0%}")
        axes.grid(visible=False)
    figure.supylabel(f"bytes of the budget ({unit})", fontsize=9.5)
    handles = [Patch(color=style.MEMORY_COLORS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds))
    shares = contest(pd.Series(mean_useful), "{:.0%}".format, most_first=True)
    style.set_title(figure, f"{phase}, {workload}: share of the budget that is useful on average: {shares}")
    return figure, data


@_styled
def pool_over_time(run: Run, phase: str, workload: str) -> Drawn:
    """A map of the pool: every column is one moment, every row one slice of addresses, its colour what lies there."""
    data = series(run, "pool_map", phase, workload)[["strategy", "step", "time_s", "cells"]].copy()
    names = present(run, data)
    figure = style.new_figure(0.9 + 2.3 * style.panel_rows(len(names)))
    colors = ListedColormap([style.KIND_COLORS[kind] for kind in Kind])
    mixed = {}
    for axes, name in zip(style.panels(figure, len(names), "time (s)"), names):
        rows = data[data["strategy"] == name]
        cells = np.array([[int(cell) for cell in text] for text in rows["cells"]]).T
        moments = edges(rows["time_s"].to_numpy(dtype=float))
        bounds = np.linspace(0, 100, len(cells) + 1)
        axes.pcolormesh(moments, bounds, cells, cmap=colors, vmin=-0.5, vmax=len(Kind) - 0.5, rasterized=True)
        axes.grid(visible=False)
        mixed[name] = ((cells == Kind.STATE).any(axis=1) & (cells == Kind.KV).any(axis=1)).mean()
        style.panel_title(axes, name, f"both in turn {mixed[name]:.0%}")
    figure.supylabel("address (% of the budget)", fontsize=9.5)
    texts = {
        Kind.FREE: "free",
        Kind.STATE: "recurrent state",
        Kind.KV: "KV",
        Kind.RESERVED: "reserved",
        Kind.CACHED: "cached",
    }
    shown = sorted({int(cell) for text in data["cells"] for cell in set(text)})
    handles = [Patch(color=style.KIND_COLORS[Kind(kind)], label=texts[Kind(kind)]) for kind in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    shares = contest(pd.Series(mixed), "{:.0%}".format, most_first=True)
    style.set_title(figure, f"{phase}, {workload}: addresses that held states and KV in turn: {shares}")
    data["cells"] = data["cells"].str.translate(KIND_LETTERS)
    return figure, data


@_styled
def queue_over_time(run: Run, phase: str, workload: str) -> Drawn:
    """Running and waiting requests over time."""
    data = series(run, "sample", phase, workload)[["strategy", "step", "time_s", "running", "waiting"]]
    names = present(run, data)
    styles = style.strategy_styles(run.strategies)
    figure = style.new_figure(5.2)
    running, waiting = figure.subplots(2, 1, sharex=True)
    for i, name in enumerate(names):
        rows = data[data["strategy"] == name]
        for axes, column in ((running, "running"), (waiting, "waiting")):
            axes.step(
                rows["time_s"],
                rows[column],
                where="post",
                color=styles[name][0],
                **style.line_style(i, name),
                label=label(name) if column == "running" else None,
            )
    for axes, text in ((running, "running requests"), (waiting, "waiting requests")):
        axes.set_ylabel(text)
        axes.set_ylim(0, max(axes.get_ylim()[1], 1))
        axes.margins(x=0.01)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    waiting.set_xlabel("time (s)")
    figure.legend(loc="outside right center")
    means = pd.Series({name: time_mean(data[data["strategy"] == name], "running") for name in names})
    counts = contest(means, "{:.3g}".format, most_first=True)
    style.set_title(figure, f"{phase}, {workload}: requests running on average: {counts}")
    return figure, data


# -- speed -------------------------------------------------------------------------------------------------------------

MAX_TITLE_WORKLOADS = 2
"""Workloads that the throughput's title speaks of; a longer title would not be read."""

THROUGHPUT_COLUMNS = {
    "output_tokens_per_s": "output tokens/s",
    "preemptions": "preemptions",
    "recomputed_tokens": "recomputed tokens",
}


@_styled
def throughput(run: Run, phase: str) -> Drawn:
    """Output tokens per second, with preemptions and recomputed tokens beside it: means, and a dot per repetition."""
    rows = run.rows(phase)
    missing = [name for name in THROUGHPUT_COLUMNS if name not in rows.columns]
    if missing:
        raise NoData(f"results have no {', '.join(missing)}")
    data = rows[["workload", "strategy", "repetition", *THROUGHPUT_COLUMNS]].dropna(subset="output_tokens_per_s")
    if data.empty:
        raise NoData(f"results have no output_tokens_per_s in phase {phase}")
    names, workloads = present(run, data), list(dict.fromkeys(data["workload"]))
    styles = style.strategy_styles(run.strategies)
    figure = style.new_figure(0.9 + (0.45 + 0.27 * len(names)) * len(workloads))
    grid = figure.subplots(len(workloads), 3, sharey=True, squeeze=False, width_ratios=(1.5, 1, 1))
    for line, workload in zip(grid, workloads):
        of_workload = data[data["workload"] == workload].groupby("strategy")
        for axes, (column, title) in zip(line, THROUGHPUT_COLUMNS.items()):
            values = {name: of_workload.get_group(name)[column] for name in names if name in of_workload.groups}
            _bars(axes, values, styles, counts=column != "output_tokens_per_s")
            axes.set_title(f"{workload}: {title}" if column == "output_tokens_per_s" else title, loc="left")
        line[0].set_yticks(range(len(names)), [label(name) for name in names])
        line[0].set_ylim(len(names) - 0.45, -0.55)
    parts = []
    for workload in workloads[:MAX_TITLE_WORKLOADS]:
        means = data[data["workload"] == workload].groupby("strategy", sort=False)["output_tokens_per_s"].mean()
        parts.append(f"{workload}: {contest(means, number_text, most_first=True)}")
    style.set_title(figure, f"{phase}, output tokens/s. {'; '.join(parts)}")
    return figure, data


@_styled
def latency(run: Run, phase: str, workload: str) -> Drawn:
    """Time to the first token and per output token: p25 to p75 as a bar, p5 to p95 as a line, p50 and p99 marked."""
    events = run.select("request", phase, workload)
    if events.empty:
        raise NoData(f"no request events of {phase}, {workload}")
    data = percentiles(events)
    names = present(run, data)
    styles = style.strategy_styles(run.strategies)
    figure = style.new_figure(1.5 + 0.34 * len(names))
    grid = figure.subplots(1, 2, sharey=True)
    texts = {"ttft_s": "time to first token (TTFT)", "tpot_s": "time per output token (TPOT)"}
    for axes, (metric, text) in zip(grid, texts.items()):
        rows = data[data["metric"] == metric].set_index("strategy")
        axes.set_title(text, loc="left")
        if rows.empty or rows["p05"].min() <= 0:
            axes.text(0.5, 0.5, "no request with a second token" if rows.empty else "times of zero", ha="center",
                      transform=axes.transAxes)  # fmt: skip
            continue
        for i, name in enumerate(names):
            if name in rows.index:
                _box(axes, i, rows.loc[name], styles[name][0])
        style.log_axis(axes, rows["p05"].min(), rows["p99"].max(), SECONDS)
        axes.set_xlabel("time (log scale)")
    grid[0].set_yticks(range(len(names)), [label(name) for name in names])
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    first = data[data["metric"] == "ttft_s"].set_index("strategy")["p50"]
    if first.empty:
        raise NoData(f"no request of {phase}, {workload} got a token")
    style.set_title(figure, f"{phase}, {workload}: median TTFT {contest(first, seconds_text)}")
    return figure, data


# -- helpers -----------------------------------------------------------------------------------------------------------


def _bars(axes: Axes, values: dict[str, pd.Series], styles: dict[str, tuple[str, str]], counts: bool) -> None:
    top = max((found.max() for found in values.values() if np.isfinite(found.max())), default=0) or 1
    for i, (name, found) in enumerate(values.items()):
        bars = axes.barh(i, found.mean(), height=0.66, color=styles[name][0])
        if name == BOUND:
            bars[0].set(hatch="////", edgecolor="white")
        if found.nunique() > 1:
            axes.plot(found, [i] * len(found), "o", markersize=3, color="#222222", markeredgecolor="white", zorder=3)
        end = found.max() if np.isfinite(found.max()) else 0
        axes.text(end + 0.025 * top, i, number_text(found.mean()), va="center", fontsize=8.5, color="#333333")
    axes.set_xlim(0, top * 1.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=counts))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _box(axes: Axes, i: int, row: pd.Series, color: str) -> None:
    axes.plot([row["p05"], row["p95"]], [i, i], color=color, linewidth=1.6, solid_capstyle="butt")
    axes.barh(i, row["p75"] - row["p25"], left=row["p25"], height=0.5, color=color)
    axes.plot([row["p50"]] * 2, [i - 0.25, i + 0.25], color="white", linewidth=2.2)
    axes.plot([row["p99"]], [i], marker="|", markersize=9, markeredgewidth=1.8, color=color)
