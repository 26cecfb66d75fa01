"""Report: a run that compares strategies, as figures with their data and one page over them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hybridcache.observe.report import comparison as compared
from hybridcache.observe.report.capacity_figures import residents_by_length, waste_by_length
from hybridcache.observe.report.comparison import BY_COLUMN, METRICS, Metric, clock_means_nothing, compare, label
from hybridcache.observe.report.load import SERVING_PHASES, NoData, Run, load_run
from hybridcache.observe.report.memory_figures import memory_over_time, pool_over_time, queue_over_time
from hybridcache.observe.report.page import SUFFIXES, Best, Card, Picture, Section, file_name, save_picture, write_page
from hybridcache.observe.report.reuse_figures import has_rounds, reuse, rounds_table
from hybridcache.observe.report.speed_figures import latency, step_profile, throughput
from hybridcache.observe.report.style import Drawn
from hybridcache.observe.report.units import budget_text, plural

TEXTS = yaml.safe_load(files("hybridcache.observe.report").joinpath("texts.yaml").read_text(encoding="utf-8"))
CAPACITY_FIGURES = {"residents_by_length": residents_by_length, "waste_by_length": waste_by_length}
PHASE_FIGURES = {"throughput": throughput, "reuse": reuse, "step_profile": step_profile}
WORKLOAD_FIGURES = {"memory": memory_over_time, "pool": pool_over_time, "queue": queue_over_time, "latency": latency}


def write_report(run_dir: str | PathLike[str]) -> Path:
    """Draw a run's figures into ``figures/`` and write ``report.html``; both replace older ones. Returns the page's path.

    A figure whose data the run lacks is left out, and the page says so.

    Raises:
        UserError: the directory holds no readable run (see :func:`load_run`).
    """
    run = load_run(run_dir)
    left_out = [f"{name}: not in the run directory" for name in run.absent]
    for phase in ("capacity", *SERVING_PHASES):
        if phase not in run.phases:
            left_out.append(f"figures of phase {phase}: this run has no such phase")
    pictures: dict[tuple[str, ...], list[Picture]] = {}
    for (kind, *where), draw in _plans(run):
        name = "_".join([kind, *map(file_name, where)])
        try:
            figure, data = draw()
            notes = _refusals(run, *where) if kind in ("throughput", "latency") else []
            caption = " ".join([TEXTS["captions"][kind], *notes])
            shown = pictures.setdefault(tuple(where or ["capacity"]), [])
            shown.append(save_picture(run.path / "figures", name, figure, data, caption))
        except NoData as reason:
            left_out.append(f"{name}: {reason}")
            for suffix in SUFFIXES:
                (run.path / "figures" / f"{name}{suffix}").unlink(missing_ok=True)
    sections = [_answers(run), *_tables(run), *_figures(run, pictures)]
    sections += [Section("Terms", anchor="terms", terms=TEXTS["terms"]), _data(run, left_out)]
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else ""
    return write_page(run.path, _title(run), _about(run), sections, _header(run), config)


def _plans(run: Run) -> Iterator[tuple[tuple[str, ...], Callable[[], Drawn]]]:
    """Every figure: its kind and, where it shows one, phase and workload; and how it is drawn."""
    for phase in run.phases:
        if phase == "capacity":
            yield from (((kind,), partial(draw, run)) for kind, draw in CAPACITY_FIGURES.items())
            continue
        for kind, draw in PHASE_FIGURES.items():
            if (kind != "step_profile" or kind in run.events) and (kind != "reuse" or "policy" in run.results.columns):
                yield (kind, phase), partial(draw, run, phase)
        for workload in () if has_rounds(run, phase) else run.workloads(phase):
            for kind, draw_workload in WORKLOAD_FIGURES.items():
                yield (kind, phase, workload), partial(draw_workload, run, phase, workload)


def _refusals(run: Run, phase: str, workload: str | None = None) -> list[str]:
    """What strategies refused of one workload, or of all workloads of a phase."""
    notes = {name: compare(run, phase, name).note for name in ([workload] if workload else run.workloads(phase))}
    return [f"{name}: {note}" for name, note in notes.items() if note]


# -- header ------------------------------------------------------------------------------------------------------------


def _unique(rows: pd.DataFrame, column: str, text: Callable[[Any], str] = str) -> str:
    return ", ".join(dict.fromkeys(map(text, rows[column].dropna()))) if column in rows.columns else ""


def _budget(rows: pd.DataFrame) -> str:
    """What the phase's strategies got, on each rank."""
    columns = [name for name in ("budget_bytes", "tp_size") if name in rows.columns]
    found = (
        rows[columns].dropna(subset=columns).drop_duplicates().to_dict("records") if "budget_bytes" in columns else []
    )
    return ", ".join(map(budget_text, found))


def _title(run: Run) -> str:
    """Experiment, model, workload and budget: those of the first phase that serves, else of the first phase."""
    phase = next((phase for phase in run.phases if phase in SERVING_PHASES), run.phases[0])
    rows, workloads = run.rows(phase), run.workloads(phase)
    workload = f"{len(workloads)} workloads" if len(workloads) > 3 else ", ".join(workloads)
    parts = (_unique(rows, "model"), "" if phase == "capacity" else workload, _budget(rows))
    experiment = _unique(run.results, "experiment") or run.path.resolve().name
    return f"Experiment {experiment}: {' · '.join(filter(None, parts))}"


def _about(run: Run) -> list[str]:
    started = str(run.environment.get("started", "")).replace("T", " ").replace("+00:00", " UTC")
    count = len(run.strategies)
    texts = (f"{count} strateg{'y' if count == 1 else 'ies'}", started, f"run {run.path.resolve().name}")
    return [" · ".join(filter(None, texts))]


def _header(run: Run) -> list[list[str]]:
    """What each phase ran: model, workloads, budget, device."""
    table = [["phase", "model", "workload", "budget", "device"]]
    for phase in run.phases:
        rows = run.rows(phase)
        workload = "identical requests" if phase == "capacity" else _unique(rows, "workload")
        device = " · ".join(filter(None, (_unique(rows, "device"), _unique(rows, "backend"))))
        table.append([phase, _unique(rows, "model"), workload, _budget(rows), device])
    return table


# -- answers and tables ------------------------------------------------------------------------------------------------


def _answers(run: Run) -> Section:
    """What a reader asks first: who did best in what, by how much, and what was not compared."""
    cards: list[Card] = []
    alike, notes = [], []
    for title, verdict, comparison in compared.contests(run):
        if verdict.decided:
            cards.append(_card(title, verdict, comparison))
        elif len(verdict.means) > 1:
            alike.append(title)
    for phase in run.phases:
        notes += _refusals(run, phase) if phase != "capacity" else []
        if clock_means_nothing(run, phase):
            because = "they are wall-clock times of a CPU, where the host decides and not the strategy"
            notes.append(f"Times of {phase} are not ranked: {because}.")
    if alike:
        notes.append(f"No difference beyond the noise in: {'; '.join(alike)}.")
    if not cards and not alike:
        notes.append("The results hold nothing to compare.")
    about = "Computed from the results. The byte-exact bound takes no part: no allocator can reach it in general."
    return Section("Best by metric", [about], anchor="best", cards=cards, notes=notes)


def _card(title: str, verdict: compared.Verdict, comparison: compared.Comparison) -> Card:
    best, worst = verdict.means[verdict.best[0]], verdict.means[verdict.worst[0]]
    notes = [f"within {verdict.noise}: {', '.join(verdict.alike)}"] if verdict.alike else []
    ratio = f" (factor {max(best, worst) / min(best, worst):.2f})" if min(best, worst) > 0 else ""
    if verdict.half_interval is not None:
        ratio = f" ({best / worst - 1:+.1%} ± {verdict.half_interval:.1%}, 95 %)"
    notes.append(f"against {verdict.text(worst)} under {verdict.worst[0]}{ratio}")
    if comparison.common:
        notes.append("over the requests that all served")
    names = verdict.best
    shown = ", ".join(names) if len(names) <= 3 else f"{len(names)} of {len(verdict.means)} strategies"
    return Card(title, verdict.text(best), shown, "; ".join(notes))


def _tables(run: Run) -> Iterator[Section]:
    about = (
        "A shaded cell is the best of its column, or cannot be told from it (the bound left out). A column in which all are "
        "alike has none, nor have times measured on a CPU, nor strategies that did not serve the same requests."
    )
    yield Section("Results", [about], anchor="results")
    for phase in run.phases:
        if has_rounds(run, phase):
            yield rounds_table(run, phase)
            continue
        for workload in run.workloads(phase) if phase != "capacity" else ():
            yield serving_table(run, phase, workload)


def serving_table(run: Run, phase: str, workload: str) -> Section:
    """Means over repetitions of every metric that the results have, with their standard deviations."""
    rows, comparison = run.rows(phase, workload), compare(run, phase, workload)
    repetitions, unranked = rows["repetition"].nunique(), clock_means_nothing(run, phase)
    shown = [metric for metric in METRICS if metric.column in rows.columns and rows[metric.column].notna().any()]
    shown = [metric for metric in shown if metric.always or rows[metric.column].any()]
    groups = rows.groupby("strategy")[[metric.column for metric in shown]]
    means, spreads = groups.mean(), groups.std()
    table = {name: [label(name)] for name in run.strategies if name in means.index}
    for metric in shown:
        verdict = None if comparison.common or (unranked and metric.clock) else comparison.judge(metric)
        shaded = {*verdict.best, *verdict.alike} if verdict is not None and verdict.decided else set()
        for name, cells in table.items():
            text = _cell(means.at[name, metric.column], spreads.at[name, metric.column], metric)
            cells.append(Best(text) if name in shaded else text)
    offered = f", {plural(rows['requests_offered'].max(), 'request')}" if "requests_offered" in rows.columns else ""
    over = f" (means ± standard deviations of {repetitions} repetitions)" if repetitions > 1 else ""
    notes = (comparison.note, token_agreement(run, phase, workload), shortfall(run, phase, workload))
    return Section(
        f"{phase.capitalize()}: {workload}{offered}{over}",
        headings=["strategy", *(metric.heading for metric in shown)],
        rows=list(table.values()),
        notes=[note for note in notes if note],
    )


def _cell(mean: float, spread: float, metric: Metric) -> str:
    if pd.isna(mean):
        return ""
    return metric.text(mean) + (f" ± {metric.text(spread)}" if spread > 0 else "")


def token_agreement(run: Run, phase: str, workload: str) -> str | None:
    """Whether all strategies sampled the same tokens; None where the results carry no hash of them."""
    rows = run.rows(phase, workload)
    rows = rows[rows["tokens_sha256"].notna()] if "tokens_sha256" in rows.columns else rows.iloc[:0]
    count = rows["strategy"].nunique()
    if count < 2:
        return None
    if (rows.groupby("repetition")["tokens_sha256"].nunique() == 1).all():
        return f"All {count} strategies sampled the same tokens (SHA-256 {rows['tokens_sha256'].iloc[0][:12]})."
    return (
        f"The {count} strategies did not all sample the same tokens: batches of different shape round differently in "
        "float32 and bfloat16, and near-ties flip. Hashes are in results.parquet."
    )


def shortfall(run: Run, phase: str, workload: str, name: str = "shared_pool") -> str | None:
    """Where ``name`` serves fewer tokens a second than the best, beyond the noise: by how much, and which of the memory's
    figures speak for the other. None where it does not, where times mean nothing, or in a simulation."""
    comparison = compare(run, phase, workload)
    verdict = comparison.judge(BY_COLUMN["output_tokens_per_s"])
    if phase != "inference" or clock_means_nothing(run, phase) or verdict is None or name not in verdict.means:
        return None
    if name in verdict.best or name in verdict.alike:
        return None
    best, reasons = verdict.best[0], []
    for metric in METRICS:
        found = None if metric.clock else comparison.judge(metric)
        if found is not None and name not in found.best and best in found.means:
            theirs, ours = found.means[best], found.means[name]
            if metric.better * (theirs - ours) > 0 and metric.text(theirs) != metric.text(ours):
                reasons.append(f"{metric.heading} {metric.text(theirs)} against {metric.text(ours)}")
    because = "; ".join(reasons) or "none of the memory's figures speaks for it, so look at the spread of repetitions"
    ahead = verdict.means[best] / verdict.means[name] - 1
    return f"{best} serves {ahead:.1%} more tokens a second than {name}: {because}."


# -- figures and files -------------------------------------------------------------------------------------------------


def _figures(run: Run, pictures: Mapping[tuple[str, ...], list[Picture]]) -> Iterator[Section]:
    for phase in run.phases:
        yield Section(phase.capitalize(), [TEXTS["phases"].get(phase, "")], pictures.get((phase,), []), anchor=phase)
        for workload in run.workloads(phase) if phase != "capacity" and not has_rounds(run, phase) else ():
            yield Section(f"{phase.capitalize()}, {workload}", figures=pictures.get((phase, workload), []))


def _data(run: Run, left_out: list[str]) -> Section:
    again = "python -m hybridcache.observe.report RUN_DIR draws all of this anew; "
    again += "hybridcache.observe.report.load_run(RUN_DIR) gives the tables in Python."
    found = {name: text for name, text in TEXTS["files"].items() if (run.path / name).exists()}
    notes = [again, *(f"Left out: {line}." for line in left_out)]
    texts = [f"Beside this page, in the run directory {run.path.resolve().name}:"]
    return Section("Raw data", texts, anchor="data", terms=found, notes=notes)
