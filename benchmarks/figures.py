"""Figures of the kernels' measurements: how close each is to the device's ceiling, and how exact it is."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from benchmarks.measure import TOLERANCE
from hybridcache.observe.report import style

STYLES = {
    "triton": ("#0072B2", "o"),
    "gluon": ("#009E73", "s"),
    "torch": ("#8A8A8A", "D"),
    "triton+plan": ("#56B4E9", "v"),
    "copy_engine": ("#661100", "P"),
    "fla": ("#D55E00", "^"),
    "fa3": ("#E69F00", "X"),
}
"""Colour and marker of an implementation."""
SPARE = ("#4B0055", "h")
PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
FLOOR = 1e-9
"""A relative error below it, 0 included, is drawn here."""


def row_label(row: pd.Series) -> str:
    """Shape, type and layout of a row, as its axis says it."""
    parts = [str(row["shape"])]
    if str(row["op"]) == "gdn_decode":
        parts = [f"B={row['shape']}", {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])]
    if pd.notna(row["kernel_block"]):
        order = "layer" if row["layout"] == "layer_major" else "block"
        parts.append(f"{order} {int(row['kernel_block'])}/{int(row['manager_block'])}")
    return " ".join(parts)


def fraction_of_ceiling(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """One panel per operation, a line per shape, a mark per implementation; hollow marks had their data in the L2 cache."""
    data = _labelled(rows.dropna(subset="fraction"))
    figure = _panels(data, "fraction")
    for axes in figure.axes:
        axes.set_xlim(0, max(1.0, 1.03 * float(data["fraction"].max())))
        axes.xaxis.set_major_locator(MultipleLocator(0.2))
        axes.xaxis.set_major_formatter(PERCENT)
        axes.axvline(1.0, color="#C00000", lw=1.0, zorder=1)
    ours = data[data["impl"].isin(["triton", "gluon"])]
    best = ours.groupby(["op", "label"])["fraction"].max()
    if len(best):
        count = (best >= 0.8).sum()
        text = (
            f"Our kernels reach 80 % of the ceiling at {count} of {len(best)} shapes; the median is {best.median():.0%}"
        )
    else:
        text = "Fraction of the ceiling"
    style.set_title(figure, text)
    columns = [
        "op",
        "impl",
        "shape",
        "dtype",
        "kernel_block",
        "manager_block",
        "layout",
        "l2",
        "fraction",
        "bound",
        "median_ms",
    ]
    return figure, data[columns]


def relative_errors(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Relative error of every implementation against its float64 reference."""
    data = _labelled(rows.dropna(subset="rel_error"))
    data = data.assign(drawn=data["rel_error"].clip(lower=FLOOR))
    figure = _panels(data, "drawn")
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xlim(FLOOR / 2, 3 * TOLERANCE)
        axes.set_xticks([FLOOR, 1e-7, 1e-5, 1e-3], ["0", "1e-7", "1e-5", "1e-3"])
        axes.minorticks_off()
        axes.axvline(TOLERANCE, color="#C00000", lw=1.0, zorder=1)
    largest = data.loc[data["rel_error"].idxmax()]
    style.set_title(
        figure,
        f"Largest relative error {largest['rel_error']:.1e} ({largest['op']}, {largest['impl']}); allowed are {TOLERANCE:g}",
    )
    return figure, data[["op", "impl", "shape", "dtype", "kernel_block", "manager_block", "layout", "l2", "rel_error"]]


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(label=[row_label(row) for _, row in rows.iterrows()])


def _panels(data: pd.DataFrame, column: str) -> Figure:
    """Operations in two columns of about equal height."""
    labels = {op: list(dict.fromkeys(group["label"])) for op, group in data.groupby("op", sort=False)}
    sides = _split({op: len(found) + 1.6 for op, found in labels.items()})
    height = max(sum(len(labels[op]) + 1.6 for op in side) for side in sides)
    figure = style.new_figure(1.1 + 0.24 * max(height, 5))
    parts = figure.subfigures(1, len(sides), squeeze=False)[0]
    for part, side in zip(parts, sides):
        ratios = [len(labels[op]) + 0.4 for op in side]
        grid = part.subplots(len(side), 1, squeeze=False, height_ratios=ratios, sharex=True)[:, 0]
        for axes, op in zip(grid, side):
            _panel(axes, data[data["op"] == op], labels[op], column)
            axes.set_title(op, loc="left", fontweight="bold")
    names = [name for name in STYLES if name in set(data["impl"])] + sorted(set(data["impl"]) - set(STYLES))
    handles = [_handle(name, STYLES.get(name, SPARE)) for name in names]
    if set(data["l2"].dropna()) == {"warm", "cold"}:
        hollow = Line2D([], [], linestyle="", marker="o", markersize=7, mfc="white", mec="#444444")
        hollow.set_label("hollow: data in the L2 cache")
        handles.append(hollow)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _split(heights: dict[str, float]) -> list[list[str]]:
    """Operations in order, cut where the halves differ least; one column where there is one operation."""
    names = list(heights)
    if len(names) < 2:
        return [names]
    total = sum(heights.values())
    cut = min(range(1, len(names)), key=lambda i: abs(total - 2 * sum(heights[name] for name in names[:i])))
    return [names[:cut], names[cut:]]


def _panel(axes: Axes, rows: pd.DataFrame, labels: Sequence[str], column: str) -> None:
    for _, row in rows.iterrows():
        color, marker = STYLES.get(row["impl"], SPARE)
        face = "white" if row["l2"] == "warm" else color
        y = labels.index(row["label"])
        axes.plot(row[column], y, marker, ms=7, color=color, mfc=face, mew=1.4, clip_on=False, zorder=3, alpha=0.9)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _handle(name: str, look: tuple[str, str]) -> Line2D:
    color, marker = look
    return Line2D([], [], linestyle="", marker=marker, markersize=7, color=color, label=name)
