"""Report: figures with their data, and one self-contained page over them."""

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from hybridcache.observe.report import figures
from hybridcache.observe.report.captions import CAPTIONS, PHASES, TERMS
from hybridcache.observe.report.data import NoData
from hybridcache.observe.report.figures import Drawn
from hybridcache.observe.report.load import SERVING_PHASES, Run, load_run
from hybridcache.observe.report.step_figure import step_profile
from hybridcache.observe.report.tables import (
    Table,
    capacity_table,
    conditions,
    highlights,
    serving_table,
    shortfall,
    times_mean_nothing,
    token_agreement,
)

DPI = 150
WORKLOAD_FIGURES: dict[str, Callable[[Run, str, str], Drawn]] = {
    "memory": figures.memory_over_time,
    "pool": figures.pool_over_time,
    "queue": figures.queue_over_time,
    "latency": figures.latency,
}
FILES = {
    "results.parquet": "one row per phase, strategy, workload and repetition",
    "events.jsonl": "time series, pool maps and requests, one JSON object a line",
    "config.yaml": "the resolved configuration",
    "environment.json": "versions, device, commit, command",
    "figures": "every figure as PNG, and what it shows as CSV of the same name",
}


@dataclass(frozen=True)
class _Plan:
    """A figure to draw: file name, kind of caption, section, and how."""

    name: str
    kind: str
    section: str
    draw: Callable[[], Drawn]


@dataclass(frozen=True)
class _Shown:
    name: str
    title: str
    caption: str
    image: str


@dataclass
class _Section:
    """One phase, or one workload of it."""

    title: str
    about: str = ""
    conditions: str = ""
    notes: list[str] = field(default_factory=list)
    table: Table | None = None
    figures: list[_Shown] = field(default_factory=list)


def write_report(run_dir: str | PathLike[str]) -> Path:
    """Draw a run's figures into ``figures/`` and write ``report.html``; both replace older ones. Returns the page's path.

    A figure whose data the run lacks is left out, and the page says so.

    Raises:
        UserError: the directory holds no readable run (see :func:`load_run`).
    """
    run = load_run(run_dir)
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    shown: dict[str, list[_Shown]] = {}
    left_out = [f"{name}: not in the run directory" for name in run.absent]
    for phase in ("capacity", *SERVING_PHASES):
        if phase not in run.phases:
            left_out.append(f"figures of phase {phase}: this run has no such phase")
    for plan in _plans(run):
        try:
            shown.setdefault(plan.section, []).append(_draw(plan, folder))
        except NoData as reason:
            left_out.append(f"{plan.name}: {reason}")
            for suffix in (".png", ".csv"):
                (folder / f"{plan.name}{suffix}").unlink(missing_ok=True)
    page = run.path / "report.html"
    page.write_text(_render(run, _sections(run, shown), left_out), encoding="utf-8")
    return page


def _plans(run: Run) -> Iterator[_Plan]:
    for phase in run.phases:
        if phase == "capacity":
            yield _Plan("residents_by_length", "residents_by_length", phase, partial(figures.residents_by_length, run))
            yield _Plan("waste_by_length", "waste_by_length", phase, partial(figures.waste_by_length, run))
            continue
        yield _Plan(f"throughput_{_slug(phase)}", "throughput", phase, partial(figures.throughput, run, phase))
        if "step_profile" in run.events:
            yield _Plan(f"step_profile_{_slug(phase)}", "step_profile", phase, partial(step_profile, run, phase))
        for workload in run.workloads(phase):
            for kind, draw in WORKLOAD_FIGURES.items():
                name = f"{kind}_{_slug(phase)}_{_slug(workload)}"
                yield _Plan(name, kind, f"{phase}, {workload}", partial(draw, run, phase, workload))


def _draw(plan: _Plan, folder: Path) -> _Shown:
    """Draw one figure, write it with its data, and embed it."""
    figure, data = plan.draw()
    png = folder / f"{plan.name}.png"
    figure.savefig(png, dpi=DPI)
    data.to_csv(png.with_suffix(".csv"), index=False)
    return _Shown(
        name=plan.name,
        title=" ".join(figure.get_suptitle().split()),
        caption=CAPTIONS[plan.kind],
        image=base64.b64encode(png.read_bytes()).decode("ascii"),
    )


def _sections(run: Run, shown: Mapping[str, list[_Shown]]) -> dict[str, list[_Section]]:
    """Sections of every phase: the phase itself, then its workloads."""
    sections = {}
    for phase in run.phases:
        first = _Section(phase, PHASES.get(phase, ""), conditions(run, phase), figures=shown.get(phase, []))
        sections[phase] = [first]
        if phase == "capacity":
            first.table = capacity_table(run)
            continue
        for workload in run.workloads(phase):
            sections[phase].append(
                _Section(
                    title=f"{phase}, {workload}",
                    conditions=conditions(run, phase),
                    notes=[
                        note
                        for note in (token_agreement(run, phase, workload), shortfall(run, phase, workload))
                        if note is not None
                    ],
                    table=serving_table(run, phase, workload),
                    figures=shown.get(f"{phase}, {workload}", []),
                )
            )
    return sections


def _render(run: Run, sections: Mapping[str, list[_Section]], left_out: list[str]) -> str:
    template = files("hybridcache.observe.report").joinpath("template.html").read_text(encoding="utf-8")
    best, alike = highlights(run)
    names = list(dict.fromkeys(run.results["experiment"])) if "experiment" in run.results.columns else []
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            title=", ".join(map(str, names)) or run.path.resolve().name,
            run=run,
            run_name=run.path.resolve().name,
            environment=_flat(run.environment),
            config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
            highlights=best,
            alike=alike,
            unranked=[phase for phase in run.phases if times_mean_nothing(run, phase)],
            sections=sections,
            left_out=left_out,
            terms=TERMS,
            files={name: text for name, text in FILES.items() if (run.path / name).exists()},
        )
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as text; unknown ones are left away."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = str(value)
    return found


def _slug(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", text).strip("_.") or "unnamed"
