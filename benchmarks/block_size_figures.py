"""Figures of experiment ``kernel_block_size``."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.resources import SHARED_MEMORY_LIMIT
from hybridcache.observe.report import style
from hybridcache.observe.report.units import bytes_text, seconds_text

KIB = 1024
STYLES = {
    "page_tiled": ("#D55E00", "s", "tile = page"),
    "independent": ("#0072B2", "o", "tile independent of the page"),
    "gluon": ("#009E73", "D", "tile independent (Gluon)"),
    "fa3": ("#E69F00", "X", "FlashAttention-3"),
}
"""Colour, marker and name of a kind of kernel."""
WAYS = {
    "loop": ("#D55E00", "s", "-", "expanded request by request"),
    "broadcast": ("#E69F00", "D", "--", "expanded by broadcast"),
    "none": ("#0072B2", "o", "-", "not expanded"),
}
SPARE = ("#4B0055", "h", "other")
COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")
LIMIT_COLOR = "#C00000"


def shared_memory(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Shared memory over the kernel block, one panel per operation, with the limit."""
    figure = style.new_figure(4.4)
    operations = list(dict.fromkeys(rows["operation"]))
    grid = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for axes, operation in zip(grid, operations):
        for kind, group in rows[rows["operation"] == operation].groupby("strategy", sort=False):
            color, marker, name = STYLES.get(str(kind), SPARE)
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
                axes.plot(
                    group["length"],
                    group[name] / scale,
                    dash,
                    marker=marker,
                    color=color,
                    ms=6 if way == "broadcast" else 8,
                    lw=1.5,
                    mec="white",
                    mew=0.5,
                    label=text,
                    clip_on=False,
                )
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(set(data["length"])), [_tokens(value) for value in sorted(set(data["length"]))])
            axes.xaxis.set_minor_locator(NullLocator())
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(
            f"manager {manager:,.0f} / kernel {kernel:,.0f} tokens", loc="left", fontweight="bold"
        )
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
            color, marker, name = STYLES.get(str(kind), SPARE)
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
    ratios = (
        done[done["strategy"] == "independent"]
        .groupby(["operation", "l2"])["median_ms"]
        .agg(lambda x: x.max() / x.min())
    )
    text = "Time over the kernel block"
    if len(ratios):
        text = f"The block size changes the time of the independent kernels by a factor of {ratios.max():.2f} at most"
    style.set_title(figure, text)
    columns = ["operation", "shape", "strategy", "kernel_block", "l2", "median_ms", "spread", "overflow"]
    return figure, rows[[name for name in columns if name in rows]]


def _block_axis(axes: Axes, rows: pd.DataFrame) -> None:
    sizes = sorted(set(rows["kernel_block"]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of a kernel block")


def _legend(figure: Figure) -> None:
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found = dict(zip(labels, handles)) | found
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=len(found))


def _tokens(value: float) -> str:
    return f"{value / 1024:,.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"
