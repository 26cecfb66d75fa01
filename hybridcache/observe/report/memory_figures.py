"""Figures over time: what the budget holds, where in the pool, and who runs and waits.

Each returns a figure and the data that it shows. Curves are of the first repetition; means in titles are those of
the table, over all steps and repetitions.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hybridcache.observe.pool_map import KINDS, shares
from hybridcache.observe.report import style
from hybridcache.observe.report.comparison import BY_COLUMN, compare, label
from hybridcache.observe.report.load import Run
from hybridcache.observe.report.style import Drawn
from hybridcache.observe.report.units import byte_unit, join_names, percent_text, time_unit


@style.styled()
def memory_over_time(run: Run, phase: str, workload: str) -> Drawn:
    """The budget over time, stacked by what its bytes do; one panel per strategy."""
    columns = [f"{kind}_bytes" for kind in style.MEMORY_COLORS]
    data = run.over_time("sample", phase, workload, ["time_s", "duration_s", *columns, "held_bytes_max"])
    names, budget = run.present(data), data[columns].sum(axis=1).max()
    divisor, unit = byte_unit(budget)
    per_second, time_name = time_unit((data["time_s"] + data["duration_s"]).max())
    figure = style.new_figure(0.9 + 2.1 * style.panel_rows(len(names)))
    means = run.means(phase, workload, "utilization_mean")
    for axes, name in zip(style.panels(figure, len(names), f"time ({time_name})"), names):
        rows = _until_its_end(data[data["strategy"] == name])
        layers, times = [rows[column] / divisor for column in columns], rows["time_s"] / per_second
        axes.stackplot(times, layers, colors=list(style.MEMORY_COLORS.values()), step="post", linewidth=0)
        axes.step(times, rows["held_bytes_max"] / divisor, where="post", color=style.PEAK_COLOR, linewidth=0.8)
        axes.set_ylim(0, budget / divisor)
        axes.margins(x=0)
        style.panel_title(axes, name, f"useful {percent_text(means[name])}" if name in means else "")
        axes.grid(visible=False)
    figure.supylabel(f"bytes of the budget ({unit})", fontsize=9.5)
    handles: list[Artist] = [
        Patch(color=color, label=kind) for kind, color in style.MEMORY_COLORS.items() if data[f"{kind}_bytes"].any()
    ]
    handles.append(Line2D([], [], color=style.PEAK_COLOR, linewidth=0.8, label="most held"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    _title(figure, run, phase, workload, "utilization_mean", "share of the budget that is useful on average")
    return figure, data


@style.styled()
def pool_over_time(run: Run, phase: str, workload: str) -> Drawn:
    """A map of the pool: every column is one moment, every row one slice of addresses, its colour what lies there."""
    data = run.over_time("pool_map", phase, workload, ["time_s", *KINDS])
    names = run.present(data)
    figure = style.new_figure(0.9 + 2.3 * style.panel_rows(len(names)))
    per_second, time_name = time_unit(data["time_s"].max())
    in_turn, seen = {}, set()
    for axes, name in zip(style.panels(figure, len(names), f"time ({time_name})"), names):
        rows = data[data["strategy"] == name]
        cells = {kind: np.stack([shares(text) for text in rows[kind]], axis=1) for kind in KINDS}
        seen |= {kind for kind in KINDS if cells[kind].any()}
        free = np.clip(1 - sum(cells.values()), 0, 1)
        picture = sum(
            share[..., None] * style.rgb(style.KIND_COLORS[kind]) for kind, share in {**cells, "free": free}.items()
        )
        moments, bounds = _edges(rows["time_s"].to_numpy() / per_second), np.linspace(0, 100, len(free) + 1)
        axes.pcolormesh(moments, bounds, np.clip(picture, 0, 1), rasterized=True)
        axes.grid(visible=False)
        # Of a slice's addresses, what its most of states and its most of KV have in common at least.
        in_turn[name] = float(np.mean(np.maximum(cells["state"].max(axis=1) + cells["kv"].max(axis=1) - 1, 0)))
        style.panel_title(axes, name, f"both in turn {in_turn[name]:.0%}")
    figure.supylabel("address (% of the budget)", fontsize=9.5)
    words = {"state": "recurrent state", "kv": "KV", "cached": "cached", "reserved": "reserved"}
    handles = [Patch(color=style.KIND_COLORS[kind], label=words[kind]) for kind in KINDS if kind in seen]
    rest = "free" if "reserved" in seen else "free or reserved"
    handles.append(Patch(color=style.KIND_COLORS["free"], label=rest))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    style.set_title(
        figure, f"{phase}, {workload}: addresses that held states and KV in turn: {_range(in_turn, '{:.0%}'.format)}"
    )
    return figure, data


@style.styled()
def queue_over_time(run: Run, phase: str, workload: str) -> Drawn:
    """Running and waiting requests over time."""
    columns = ["time_s", "duration_s", "running", "waiting", "running_max", "waiting_max"]
    data = run.over_time("sample", phase, workload, columns)
    names, styles = run.present(data), style.strategy_styles(run.strategies)
    per_second, time_name = time_unit((data["time_s"] + data["duration_s"]).max())
    figure = style.new_figure(5.2)
    running, waiting = figure.subplots(2, 1, sharex=True)
    for i, name in enumerate(names):
        rows = _until_its_end(data[data["strategy"] == name])
        line = {"where": "post", "color": styles[name][0], **style.line_style(i, name)}
        running.step(rows["time_s"] / per_second, rows["running_max"], **line, label=label(name))
        waiting.step(rows["time_s"] / per_second, rows["waiting_max"], **line)
    for axes, text in ((running, "running requests"), (waiting, "waiting requests")):
        axes.set_ylabel(text)
        axes.set_ylim(0, max(axes.get_ylim()[1], 1))
        axes.margins(x=0.01)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    waiting.set_xlabel(f"time ({time_name})")
    figure.legend(loc="outside right center")
    _title(figure, run, phase, workload, "running_mean", "requests running on average")
    return figure, data


def _title(figure: style.Figure, run: Run, phase: str, workload: str, column: str, text: str) -> None:
    verdict = compare(run, phase, workload).judge(replace(BY_COLUMN[column], better=+1))
    style.set_title(figure, f"{phase}, {workload}: {text}" + (f": {verdict.words()}" if verdict else ""))


def _range(values: dict[str, float], text: Callable[[float], str]) -> str:
    """The least and the most, and who has them, without a ranking."""
    shown = {name: text(value) for name, value in values.items()}
    ends = dict.fromkeys((text(min(values.values())), text(max(values.values()))))
    parts = (f"{end} ({join_names([name for name in shown if shown[name] == end])})" for end in ends)
    return " to ".join(parts)


def _until_its_end(rows: pd.DataFrame) -> pd.DataFrame:
    """A series that keeps each value until the next, with its last value once more where its last slice ends."""
    end = rows.iloc[[-1]]
    return pd.concat([rows, end.assign(time_s=end["time_s"] + end["duration_s"])])


def _edges(times: np.ndarray) -> np.ndarray:
    """Column borders of a map: each moment lasts until the next, the last one as long as the one before."""
    last = times[-1] - times[-2] if len(times) > 1 and times[-1] > times[-2] else 1.0
    return np.append(times, times[-1] + last)
