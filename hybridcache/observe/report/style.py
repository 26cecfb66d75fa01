"""Style: colours, axes and the grid of panels that every figure shares."""

import textwrap
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hybridcache.observe.report.comparison import is_bound, label

Drawn = tuple[Figure, pd.DataFrame]
"""A figure and the data that it shows."""

WIDTH = 11.0
"""Inches of every figure."""

LOOK = yaml.safe_load(files("hybridcache.observe.report").joinpath("style.yaml").read_text(encoding="utf-8"))
MEMORY_COLORS: dict[str, str] = LOOK["memory"]
KIND_COLORS: dict[str, str] = LOOK["kinds"]
PEAK_COLOR = "#222222"
_MARKERS = "osD^vPXh"


def rgb(color: str) -> np.ndarray:
    """A colour as three floats from 0 to 1."""
    return np.array(mpl.colors.to_rgb(color))


def text_on(color: str) -> str:
    """A colour of text that is read on that one (relative luminance as in WCAG 2)."""
    channels = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in mpl.colors.to_rgb(color))
    luminance = sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), channels))
    return "#1A1A1A" if luminance > 0.179 else "#FFFFFF"


def strategy_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every strategy. Known names always get the same; others take spare colours in order."""
    known, more = LOOK["strategies"], LOOK["more"]
    others = [name for name in names if name not in known]
    styles = {name: (color, marker) for (name, color), marker in zip(known.items(), _MARKERS)}
    styles |= {name: (more[i % len(more)], _MARKERS[(i + 3) % len(_MARKERS)]) for i, name in enumerate(others)}
    return {name: styles[name] for name in names}


def new_figure(height: float) -> Figure:
    """A figure of the common width, outside pyplot (nothing to close, no backend to choose)."""
    return Figure(figsize=(WIDTH, height), dpi=100, layout="constrained")


def set_title(figure: Figure, text: str) -> None:
    wrapped = "\n".join(textwrap.wrap(text, width=100))
    figure.suptitle(wrapped, x=0.008, ha="left", fontsize=12.5, fontweight="bold", color="#1A1A1A")


def panel_columns(count: int) -> int:
    """Panels in a row: at most three, so that their titles fit."""
    return 2 if count == 4 else min(count, 3)


def panel_rows(count: int) -> int:
    return -(-count // panel_columns(count))


def panels(figure: Figure, count: int, x_label: str) -> list[Axes]:
    """``count`` panels with shared axes; only the lowest of a column carries the x axis."""
    columns = panel_columns(count)
    grid = figure.subplots(panel_rows(count), columns, sharex=True, sharey=True, squeeze=False)
    flat = list(grid.flat)
    for i, axes in enumerate(flat):
        if i >= count:
            axes.remove()
        elif i + columns >= count:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(x_label)
    return flat[:count]


def panel_title(axes: Axes, name: str, note: str) -> None:
    """The strategy's name on the left, a figure about it on the right."""
    axes.set_title(textwrap.shorten(label(name), 26, placeholder="..."), loc="left", fontweight="bold")
    axes.set_title(note, loc="right", fontsize=9, color="#555555")


def line_style(i: int, name: str, wide: float = 3.6, thin: float = 1.5) -> dict[str, Any]:
    """Every other line is wide and lies behind the thin ones, so that two lines which coincide both show."""
    behind = i % 2 == 0 and not is_bound(name)
    return {
        "linewidth": wide if behind else thin,
        "zorder": 2.0 if behind else 2.5,
        "linestyle": "--" if is_bound(name) else "-",
    }


def magnitude_axis(axes: Axes, values: np.ndarray) -> None:
    """A y axis for values from zero over several powers of ten: zero at the bottom, logarithmic above the least one."""
    positive = values[values > 0]
    if not len(positive) or positive.max() / positive.min() < 20:
        axes.set_ylim(bottom=0)
        return
    low, high = int(np.floor(np.log10(positive.min()))), int(np.ceil(np.log10(positive.max())))
    axes.set_yscale("symlog", linthresh=10.0**low, linscale=0.5)
    axes.set_ylim(-0.15 * 10.0**low, 10.0**high)
    axes.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**power for power in range(low, high + 1))]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_axis(axes: Axes, low: float, high: float, text: FuncFormatter) -> None:
    """A logarithmic x axis with at least three readable ticks: powers of ten, or with 2 and 5 times them, or even steps."""
    axes.set_xscale("log")
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    ticks = list(MaxNLocator(nbins=5).tick_values(low, high))
    for steps in ((1, 2, 5), (1,)):
        found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        found = [tick for tick in found if low * 0.8 <= tick <= high * 1.25]
        ticks = found if len(found) >= 3 else ticks
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick > 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(text)


def styled() -> Any:
    """Context in which figures are drawn, or decorator of a function that draws one."""
    return mpl.rc_context(LOOK["rc"])
