"""Figures of the capacity phase. Each returns a figure and the data that it shows."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter

from hybridcache.observe.report import style
from hybridcache.observe.report.comparison import competitors, judge, label
from hybridcache.observe.report.load import Run
from hybridcache.observe.report.style import Drawn
from hybridcache.observe.report.units import budget_text, byte_unit, bytes_text, join_names, plural

MAX_LENGTHS = 12
"""Columns of the residents' table; more lengths are thinned evenly (its data keeps them all)."""


@style.styled()
def waste_by_length(run: Run) -> Drawn:
    """Bytes that one live request holds beyond its useful ones, against its length: lines where a run recorded every length,
    marks alone where it recorded some."""
    charges = run.by_length("charge")
    charges["waste_bytes"] = charges["held_bytes"] - charges["useful_bytes"]
    curves = run.events.get("waste_curve")
    if curves is None:
        data = charges
    else:
        data = curves[["strategy", "length", "waste_bytes"]].explode(["length", "waste_bytes"], ignore_index=True)
        data = data.astype({"length": np.int64, "waste_bytes": np.int64})
    styles = style.strategy_styles(run.strategies)
    divisor, unit = byte_unit(data["waste_bytes"].max())
    figure = style.new_figure(4.3)
    axes = figure.subplots()
    for i, name in enumerate(run.present(data)):
        color, marker = styles[name]
        rows = data[data["strategy"] == name].sort_values("length")
        line: dict[str, Any] = style.line_style(i, name, wide=2.8, thin=1.1)
        at = rows["length"]
        if curves is None:
            line |= {"linestyle": "", "marker": marker, "markersize": 8 if i % 2 == 0 else 5}
        else:
            at = np.arange(at.min(), at.max() + 1)  # straight between corners, which on this axis is no straight line
        waste = np.interp(at, rows["length"], rows["waste_bytes"]) / divisor
        axes.plot(at, waste, color=color, **line, label=label(name))
    tokens = FuncFormatter(lambda value, _: f"{value:,.0f}")
    if curves is None:
        style.log_axis(axes, data["length"].min(), data["length"].max(), tokens)
    else:
        axes.set_xlim(0, data["length"].max())
        axes.xaxis.set_major_formatter(tokens)
    axes.set_xlabel("request length (tokens)")
    axes.set_ylabel(f"held - useful per request ({unit})")
    style.magnitude_axis(axes, (data["waste_bytes"] / divisor).to_numpy())
    figure.legend(loc="outside right center")
    shortest = charges["length"].min()
    verdict = judge(_by_strategy(charges[charges["length"] == shortest], "waste_bytes"), bytes_text, -1, exact=True)
    style.set_title(
        figure, f"A request of {plural(shortest, 'token')} wastes {verdict.words() if verdict else 'nothing'}"
    )
    return figure, data


@style.styled()
def residents_by_length(run: Run) -> Drawn:
    """How many requests of one length fit, as a table coloured by the share of the most that any strategy fits."""
    data = run.by_length("capacity")
    table = data.pivot_table(index="strategy", columns="length", values="residents").reindex(run.present(data))
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
    budget = budget_text(run.rows("capacity").iloc[0])
    text = f"Most requests in {budget} at {wins.max()} of {table.shape[1]} lengths: {champions}"
    if len(rivals) == 1:
        text = f"{most.iat[0]:,.0f} requests of {plural(table.columns[0], 'token')} fit in {budget} under {champions}"
    style.set_title(figure, text)
    return figure, data


def _by_strategy(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row, a column per strategy."""
    return rows.set_index("strategy")[[column]].T
