"""Figures of the kernels' measurements: how close each is to the device's ceiling and how exact it is; and what the size of a
kernel block costs."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

from benchmarks.measure import TOLERANCE
from benchmarks.resources import SHARED_MEMORY_LIMIT
from hybridcache.observe.report import style
from hybridcache.observe.report.units import bytes_text, seconds_text

STYLES = {
    "triton": ("#0072B2", "o", "triton"),
    "gluon": ("#009E73", "s", "gluon"),
    "torch": ("#8A8A8A", "D", "torch"),
    "triton+plan": ("#56B4E9", "v", "triton+plan"),
    "copy_engine": ("#661100", "P", "copy_engine"),
    "fla": ("#D55E00", "^", "fla"),
    "fa3": ("#E69F00", "X", "FlashAttention-3"),
    "page_tiled": ("#D55E00", "s", "tile = page"),
    "independent": ("#0072B2", "o", "tile independent of the page"),
}
"""Colour, marker and name of an implementation."""
WAYS = {
    "loop": ("#D55E00", "s", "-", "expanded request by request"),
    "broadcast": ("#E69F00", "D", "--", "expanded by broadcast"),
    "none": ("#0072B2", "o", "-", "not expanded"),
}
SPARE = ("#4B0055", "h", "other")
LIMIT_COLOR = "#C00000"
PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
COUNT = FuncFormatter(lambda value, _: f"{value:,g}")
KIB = 1024
FLOOR = 1e-9
"""A relative error below it, 0 included, is drawn here."""
ROW = ["op", "impl", "shape", "dtype", "kernel_block", "manager_block", "layout", "l2"]
"""What a figure's data says of a row."""


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
        axes.axvline(1.0, color=LIMIT_COLOR, lw=1.0, zorder=1)
    ours = data[data["impl"].isin(["triton", "gluon"])]
    best = ours.groupby(["op", "label"])["fraction"].max()
    text = "Fraction of the ceiling"
    if len(best):
        reached = f"{(best >= 0.8).sum()} of {len(best)} shapes"
        text = f"Our kernels reach 80 % of the ceiling at {reached}; the median is {best.median():.0%}"
    style.set_title(figure, text)
    return figure, data[[*ROW, "fraction", "bound", "median_ms"]]


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
        axes.axvline(TOLERANCE, color=LIMIT_COLOR, lw=1.0, zorder=1)
    largest = data.loc[data["rel_error"].idxmax()]
    style.set_title(
        figure,
        f"Largest relative error {largest['rel_error']:.1e} ({largest['op']}, {largest['impl']}); allowed are {TOLERANCE:g}",
    )
    return figure, data[[*ROW, "rel_error"]]


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
    handles = [_handle(marker=marker, color=color, label=name) for name in names for color, marker, _ in [_look(name)]]
    if set(data["l2"].dropna()) == {"warm", "cold"}:
        handles.append(_handle(marker="o", mfc="white", mec="#444444", label="hollow: data in the L2 cache"))
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
        color, marker, _ = _look(row["impl"])
        face = "white" if row["l2"] == "warm" else color
        y = labels.index(row["label"])
        axes.plot(row[column], y, marker, ms=7, color=color, mfc=face, mew=1.4, clip_on=False, zorder=3, alpha=0.9)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _look(name: object) -> tuple[str, str, str]:
    return STYLES.get(str(name), SPARE)


def _handle(**options: object) -> Line2D:
    return Line2D([], [], linestyle="", markersize=7, **options)  # type: ignore[arg-type]


# -- block size ------------------------------------------------------------------------------------------------------------


def shared_memory(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Shared memory over the kernel block, one panel per operation, with the limit."""
    figure = style.new_figure(4.4)
    operations = list(dict.fromkeys(rows["operation"]))
    grid = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for axes, operation in zip(grid, operations):
        for kind, group in rows[rows["operation"] == operation].groupby("strategy", sort=False):
            color, marker, name = _look(kind)
            group = group.sort_values("kernel_block")
            axes.plot(group["kernel_block"], group["shared_bytes"] / KIB, "-", color=color, lw=1.4, alpha=0.6)
            for compiled, part in sorted(group.groupby("compiled"), key=lambda pair: not pair[0]):
                face = color if compiled else "white"
                label = name if compiled else f"{name}: at least"
                x, y = part["kernel_block"], part["shared_bytes"] / KIB
                axes.plot(x, y, marker, ms=7, color=color, mfc=face, mew=1.4, label=label, clip_on=False, zorder=3)
        axes.axhline(SHARED_MEMORY_LIMIT / KIB, color=LIMIT_COLOR, lw=1.3, label="limit of a Hopper GPU")
        axes.set_title(operation, loc="left", fontweight="bold")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(COUNT)
        axes.yaxis.set_minor_locator(NullLocator())
        _block_axis(axes, rows)
    grid[0].set_ylabel("shared memory of a program (KiB)")
    _legend(figure)
    over = rows[(rows["strategy"] == "page_tiled") & (rows["shared_bytes"] > SHARED_MEMORY_LIMIT)]
    first = over.groupby("operation", sort=False)["kernel_block"].min()
    ours = rows[rows["strategy"] == "independent"]["shared_bytes"]
    parts = [f"{operation} from blocks of {block:,.0f} tokens on" for operation, block in first.items()]
    text = f"A tile as large as the page overflows in {' and in '.join(parts)}" if parts else "No kernel overflows"
    if len(ours):
        text += f"; an independent one needs {bytes_text(ours.max())} at most"
    style.set_title(figure, text)
    columns = [
        "operation",
        "strategy",
        "kernel_block",
        "compiled",
        "shared_bytes",
        "registers",
        "spill_bytes",
        "overflow",
    ]
    return figure, rows[[name for name in columns if name in rows]]


def table_cost(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Host time and bytes of a step's table against length, for the largest batch; a column per geometry."""
    data = rows[rows["batch"] == rows["batch"].max()]
    geometries = list(dict.fromkeys(zip(data["manager_block"], data["kernel_block"])))
    figure = style.new_figure(6.2)
    grid = figure.subplots(2, len(geometries), sharex=True, sharey="row", squeeze=False)
    for column, (manager, kernel) in enumerate(geometries):
        part = data[(data["manager_block"] == manager) & (data["kernel_block"] == kernel)]
        for line, (name, scale, label) in enumerate(
            [("host_s", 1e-6, "host time of a step (µs)"), ("table_bytes", KIB, "table of a step (KiB)")]
        ):
            axes = grid[line, column]
            for way, (color, marker, dash, text) in WAYS.items():
                group = part[part["strategy"] == way].sort_values("length")
                look = {"marker": marker, "color": color, "mec": "white", "mew": 0.5, "lw": 1.5, "clip_on": False}
                size = 6 if way == "broadcast" else 8
                axes.plot(group["length"], group[name] / scale, dash, **look, ms=size, label=text)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(COUNT)
            axes.yaxis.set_minor_locator(NullLocator())
            _log2_axis(axes, sorted(set(data["length"])), _tokens)
            if column == 0:
                axes.set_ylabel(label)
        title = f"manager {manager:,.0f} / kernel {kernel:,.0f} tokens"
        grid[0, column].set_title(title, loc="left", fontweight="bold")
        grid[1, column].set_xlabel("tokens of a request")
    _legend(figure)
    style.set_title(figure, _table_title(data, geometries[0]))
    columns = ["manager_block", "kernel_block", "batch", "length", "strategy", "host_s", "table_bytes"]
    return figure, rows[columns]


def _table_title(data: pd.DataFrame, geometry: tuple[float, float]) -> str:
    longest = data[data["length"] == data["length"].max()]
    here = longest[(longest["manager_block"] == geometry[0]) & (longest["kernel_block"] == geometry[1])]
    by_way = here.set_index("strategy")
    expanded = min(("loop", "broadcast"), key=lambda way: by_way.loc[way, "host_s"])

    def cost(way: str) -> str:
        return f"{seconds_text(by_way.loc[way, 'host_s'])} and {bytes_text(by_way.loc[way, 'table_bytes'])} a step"

    return (
        f"{here['batch'].iloc[0]:,.0f} requests of {here['length'].iloc[0]:,.0f} tokens, manager blocks of "
        f"{geometry[0]:,.0f}: an expanded table costs "
        f"{cost(expanded)}, one that is not {cost('none')}"
    )


def time(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Median time over the kernel block, one panel per operation; crosses where a kernel does not fit the device."""
    figure = style.new_figure(4.4)
    operations = list(dict.fromkeys(rows["operation"]))
    grid = figure.subplots(1, len(operations), squeeze=False)[0]
    for axes, operation in zip(grid, operations):
        here = rows[rows["operation"] == operation]
        cold = here[here["l2"] != "warm"] if (here["l2"] == "cold").any() else here
        for kind, group in cold.groupby("strategy", sort=False):
            color, marker, name = _look(kind)
            group = group.sort_values("kernel_block")
            done = group.dropna(subset="median_ms")
            axes.plot(done["kernel_block"], done["median_ms"], "-", marker=marker, ms=7, color=color, label=name)
            too_large = group[group["overflow"].astype(bool)]["kernel_block"]
            place = axes.get_xaxis_transform()
            axes.plot(too_large, np.full(len(too_large), 0.96), "x", ms=9, mew=2, color=color, transform=place)
        axes.set_ylim(bottom=0)
        shape = here["shape"].dropna()
        axes.set_title(f"{operation} {shape.iloc[0] if len(shape) else ''}", loc="left", fontweight="bold")
        axes.set_ylabel("ms")
        _block_axis(axes, rows)
    _legend(figure)
    done = rows.dropna(subset="median_ms")
    ours = done[done["strategy"] == "independent"].groupby(["operation", "l2"])["median_ms"]
    ratios = ours.agg(lambda x: x.max() / x.min())
    text = "Time over the kernel block"
    if len(ratios):
        text = f"The block size changes the time of the independent kernels by a factor of {ratios.max():.2f} at most"
    style.set_title(figure, text)
    columns = ["operation", "shape", "strategy", "kernel_block", "l2", "median_ms", "spread", "overflow"]
    return figure, rows[[name for name in columns if name in rows]]


def _block_axis(axes: Axes, rows: pd.DataFrame) -> None:
    _log2_axis(axes, sorted(set(rows["kernel_block"])), lambda size: f"{size:,.0f}")
    axes.set_xlabel("tokens of a kernel block")


def _log2_axis(axes: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [text(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure) -> None:
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles)) | found
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=len(found))


def _tokens(value: float) -> str:
    return f"{value / 1024:,.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"
