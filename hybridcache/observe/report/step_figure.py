"""Figure of step profiles: where the time of a decode and of a prefill step goes."""

from typing import Any

import pandas as pd

from hybridcache.observe.report import style
from hybridcache.observe.report.data import NoData
from hybridcache.observe.report.figures import Drawn
from hybridcache.observe.report.load import Run
from hybridcache.observe.report.words import seconds_text

PART_COLORS = {
    "experts": "#0072B2",
    "dense products": "#56B4E9",
    "gated delta net": "#7B3294",
    "attention": "#5AAE61",
    "KV store": "#999933",
    "routing": "#E69F00",
    "sampling": "#CC79A7",
    "memory copies": "#8A8A8A",
    "norms and element-wise": "#D8B365",
    "device idle": "#DCDCDC",
    "Python": "#DCDCDC",
}
"""Colour by class of kernel (``hybridcache.observe.step_profile``), in drawing order."""


def step_profile(run: Run, phase: str) -> Drawn:
    """One bar a profiled step, cut by class of kernel; a bar's length is the whole step.

    Raises:
        NoData: the run has no profile.
    """
    events = run.events.get("step_profile")
    if events is None or events.empty or (events["phase"] == phase).sum() == 0:
        raise NoData(f"no step of {phase} was profiled")
    data = events[events["phase"] == phase][["strategy", "workload", "part", "seconds", "launches"]]
    steps = list(dict.fromkeys(data["workload"]))
    with style.styled():
        figure = style.new_figure(1.0 + 1.05 * len(steps))
        grid = figure.subplots(len(steps), 1, squeeze=False)[:, 0]
        words = []
        for axes, step in zip(grid, steps):
            parts = data[data["workload"] == step].set_index("part")["seconds"] * 1e3
            total, left = parts.sum(), 0.0
            order = [name for name in PART_COLORS if name in parts] + [
                name for name in parts.index if name not in PART_COLORS
            ]
            for name in order:
                value = parts[name]
                axes.barh(
                    0,
                    value,
                    left=left,
                    color=PART_COLORS.get(name, "#882255"),
                    edgecolor="white",
                    linewidth=0.6,
                    label=name,
                )
                if value > 0.045 * total:
                    axes.text(
                        left + value / 2,
                        0,
                        f"{value / total:.0%}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=style.text_on(PART_COLORS.get(name, "#882255")),
                    )
                left += value
            axes.set_xlim(0, total)
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.set_title(f"{step}: {seconds_text(total / 1e3)} a step", loc="left")
            biggest = str(parts.idxmax())
            words.append(
                f"{step.split(':')[0]} {seconds_text(total / 1e3)}, most of it {biggest} ({parts[biggest] / total:.0%})"
            )
        grid[-1].set_xlabel("milliseconds")
        found: dict[str, Any] = {}
        for axes in grid:
            for handle, name in zip(*axes.get_legend_handles_labels()):
                found.setdefault(name, handle)
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=6)
        style.set_title(figure, f"One step: {'; '.join(words)}")
    return figure, pd.DataFrame(data)
