"""Figures of the kernels' measurements: how close each is to the device's ceiling and how exact it is; and what the size of a
kernel block costs; and the tables and the page that show them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import TOLERANCE
from benchmarks.resources import SHARED_MEMORY_LIMIT
from hybridcache.observe.report import style
from hybridcache.observe.report.page import Section, write_page
from hybridcache.observe.report.style import Drawn
from hybridcache.observe.report.units import bytes_text

NAMES = {"page_tiled": "tile = page", "independent": "tile independent of the page"}
"""What a legend says of an implementation."""
LIMIT_COLOR = "#C00000"
COUNT = FuncFormatter(lambda value, _: f"{value:,g}")
FLOOR = 1e-9
"""A relative error below it, 0 included, is drawn here."""
ROW = ["op", "impl", "shape", "dtype", "kernel_block", "manager_block", "layout", "l2"]
"""What a figure's data says of a row."""


def row_label(row: pd.Series) -> str:
    """Shape, type and layout of a row, as its axis says it."""
    parts = [str(row["shape"])]
    if row["op"] == "gdn_decode":
        parts = [f"B={row['shape']}", str(row["dtype"])]
    if pd.notna(row["kernel_block"]):
        parts.append(f"{row['layout'].split('_')[0]} {row['kernel_block']:.0f}/{row['manager_block']:.0f}")
    return " ".join(parts)


def cell(value: Any) -> str:
    """A table's cell: a dash where there is no value."""
    if pd.isna(value):
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def section(title: str, rows: pd.DataFrame, headings: Mapping[str, str], texts: Sequence[str] = ()) -> Section:
    """A section with a table of those columns that have a value, under their headings."""
    shown = rows.filter(list(headings)).dropna(axis=1, how="all").astype(object)
    cells = [[cell(value) for value in row] for row in shown.itertuples(index=False)]
    return Section(title, list(texts), headings=[headings[name] for name in shown], rows=cells)


def show(console: Console, run_dir: Path, title: str, about: Sequence[str], sections: Sequence[Section]) -> None:
    """Print the sections' tables and write the page that holds them."""
    for section in sections:
        if section.rows:
            console.print(f"\n[bold]{section.title}[/]")
            table = Table(*section.headings, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
            for column, cells in zip(table.columns, zip(*section.rows)):
                if all(each[:1].isdigit() or each in ("-", "failed") for each in cells):
                    # A figure is never cut short, whatever becomes of the names.
                    column.justify, column.min_width = "right", max(map(len, cells))
                else:
                    column.min_width = 4
                column.overflow = "fold"
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
    write_page(run_dir, title, about, sections)


@style.styled()
def fraction_of_ceiling(rows: pd.DataFrame) -> Drawn:
    """One panel per operation, a line per shape, a mark per implementation; hollow marks had their data in the L2 cache."""
    data = rows.dropna(subset="fraction")
    figure = _dots(data, "fraction", 1.0)
    for axes in figure.axes:
        axes.set_xlim(0, max(1.0, 1.03 * float(data["fraction"].max())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    ours = data[data["impl"].isin(["triton", "gluon"])]
    best = ours.groupby(["op", *ROW[2:7]], dropna=False)["fraction"].max()
    reached = f"{(best >= 0.8).sum()} of {len(best)} shapes; the median is {best.median():.0%}"
    style.set_title(figure, f"Our kernels reach 80 % of the ceiling at {reached}" if len(best) else "No kernel of ours")
    return figure, data[[*ROW, "fraction", "bound", "median_ms"]]


@style.styled()
def relative_errors(rows: pd.DataFrame) -> Drawn:
    """Relative error of every implementation against its float64 reference."""
    data = rows.dropna(subset="rel_error")
    figure = _dots(data.assign(drawn=data["rel_error"].clip(lower=FLOOR)), "drawn", TOLERANCE)
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xlim(FLOOR / 2, 3 * TOLERANCE)
        axes.set_xticks([FLOOR, 1e-7, 1e-5, 1e-3], ["0", "1e-7", "1e-5", "1e-3"])
        axes.minorticks_off()
    largest = data.loc[data["rel_error"].idxmax()]
    where = f"{largest['rel_error']:.1e} ({largest['op']}, {largest['impl']})"
    style.set_title(figure, f"Largest relative error {where}; allowed are {TOLERANCE:g}")
    return figure, data[[*ROW, "rel_error"]]


def _dots(data: pd.DataFrame, column: str, limit: float) -> Figure:
    """A panel per operation and a line per shape, with the limit as a line across all of them."""
    data = data.assign(label=[row_label(row) for _, row in data.iterrows()])
    looks = style.strategy_styles(list(dict.fromkeys(data["impl"])))
    panels = list(data.groupby("op", sort=False))
    lines = [rows["label"].nunique() + 0.6 for _, rows in panels]
    figure = style.new_figure(1.5 + 0.22 * sum(lines) + 0.25 * len(lines))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=lines, sharex=True)[:, 0]
    for axes, (operation, rows) in zip(grid, panels):
        place, labels = pd.factorize(rows["label"])
        for (name, warm), marks in rows.assign(place=place).groupby(["impl", rows["l2"] == "warm"], sort=False):
            color, marker = looks[name]
            text, face = (f"{name}, data in the L2 cache", "white") if warm else (name, color)
            (drawn,) = axes.plot(
                marks[column], marks["place"], marker, color=color, mfc=face, mew=1.4, ms=7, label=text
            )
            drawn.set(clip_on=False, zorder=3, alpha=0.9)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_title(operation, loc="left", fontweight="bold")
        axes.axvline(limit, color=LIMIT_COLOR, lw=1.0, zorder=1)
    _legend(figure, columns=6)
    return figure


# -- block size ------------------------------------------------------------------------------------------------------------


@style.styled()
def shared_memory(rows: pd.DataFrame) -> Drawn:
    """Shared memory over the kernel block, one panel per operation, with the limit."""
    figure, panels = _operations(rows)
    for axes, here in panels:
        _lines(axes, here.assign(kib=here["shared_bytes"] / 1024), "kernel_block", "kib", "tokens of a kernel block")
        bounded = here[~here["compiled"].astype(bool)]
        axes.plot(
            bounded["kernel_block"], bounded["shared_bytes"] / 1024, "wo", mec="#444444", zorder=4, label="at least"
        )
        axes.axhline(SHARED_MEMORY_LIMIT / 1024, color=LIMIT_COLOR, lw=1.3, label="limit of a Hopper GPU")
        axes.set_yscale("log", base=2)
        axes.set_ylabel("shared memory of a program (KiB)")
        axes.yaxis.set_major_formatter(COUNT)
        axes.yaxis.set_minor_locator(NullLocator())
    _legend(figure)
    over = rows[(rows["strategy"] == "page_tiled") & (rows["shared_bytes"] > SHARED_MEMORY_LIMIT)]
    first = over.groupby("operation", sort=False)["kernel_block"].min()
    ours = rows[rows["strategy"] == "independent"]["shared_bytes"]
    parts = [f"{operation} from blocks of {block:,.0f} tokens on" for operation, block in first.items()]
    text = f"A tile as large as the page overflows in {' and in '.join(parts)}" if parts else "No kernel overflows"
    if len(ours):
        text += f"; an independent one needs {bytes_text(ours.max())} at most"
    style.set_title(figure, text)
    more = ["compiled", "shared_bytes", "registers", "spill_bytes", "overflow"]
    return figure, rows.filter(["operation", "strategy", "kernel_block", *more])


@style.styled()
def time(rows: pd.DataFrame) -> Drawn:
    """Median time over the kernel block, one panel per operation; crosses where a kernel does not fit the device."""
    figure, panels = _operations(rows)
    for axes, here in panels:
        cold = here[here["l2"] != "warm"] if (here["l2"] == "cold").any() else here
        _lines(axes, cold.dropna(subset="median_ms"), "kernel_block", "median_ms", "tokens of a kernel block")
        too_large = cold[cold["overflow"].astype(bool)]["kernel_block"]
        (crosses,) = axes.plot(
            too_large, [0.96] * len(too_large), "x", ms=9, mew=2, color=LIMIT_COLOR, label="does not fit"
        )
        crosses.set_transform(axes.get_xaxis_transform())
        axes.set_ylim(bottom=0)
        axes.set_ylabel("ms")
    _legend(figure)
    ours = rows[rows["strategy"] == "independent"].dropna(subset="median_ms").groupby(["operation", "l2"])["median_ms"]
    ratio = (ours.max() / ours.min()).max()
    text = f"The block size changes the time of the independent kernels by a factor of {ratio:.2f} at most"
    style.set_title(figure, text)
    more = ["l2", "median_ms", "spread", "overflow"]
    return figure, rows.filter(["operation", "shape", "strategy", "kernel_block", *more])


def _operations(rows: pd.DataFrame) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A panel per operation, with the operation's rows."""
    figure, groups = style.new_figure(4.4), list(rows.groupby("operation", sort=False))
    grid = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (operation, here) in zip(grid, groups):
        shapes = here["shape"].dropna() if "shape" in here else []
        axes.set_title(" ".join([str(operation), *shapes[:1]]), loc="left", fontweight="bold")
    return figure, [(axes, here) for axes, (_, here) in zip(grid, groups)]


def _lines(axes: Axes, rows: pd.DataFrame, x: str, y: str, x_label: str) -> None:
    """A line per implementation over powers of two."""
    looks = style.strategy_styles([*NAMES, *sorted(set(rows["strategy"]) - set(NAMES))])  # the same in every panel
    for i, (name, group) in enumerate(rows.sort_values(x).groupby("strategy", sort=False)):
        color, marker = looks[name]
        line = style.line_style(i, str(name))
        axes.plot(group[x], group[y], marker=marker, color=color, ms=7, label=NAMES.get(str(name), str(name)), **line)
    ticks = sorted(set(rows[x]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{size / 1024:,.0f}k" if size % 1024 == 0 else f"{size:,.0f}" for size in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(x_label)


def _legend(figure: Figure, columns: int = 4) -> None:
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles)) | found
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), columns))
