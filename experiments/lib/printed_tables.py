"""Result tables on the terminal: as wide as it is, 80 columns at least."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from hybridcache.observe.report.comparison import competitors, half_interval
from hybridcache.observe.report.units import budget_text, bytes_text, seconds_text

MIB = 1 << 20
WIDE = 118
"""Columns from which the memory and the speed of a run share one table."""


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else seconds_text(value)


MEMORY: dict[str, tuple[str, Callable[[float], str]]] = {
    "served": ("requests_served", _count),
    "re-\nfused": ("requests_refused", _count),
    "resi-\ndents": ("residents_peak", _count),
    "useful": ("utilization_mean", _share),
    "held": ("held_share", _share),
    "pre-\nempted": ("preemptions", _count),
    "recom-\nputed": ("recomputed", _count),
}
"""Columns about memory: heading, column of the means, and how a value reads."""
BYTES_BY_KIND = {"held_bytes_mean": "live", "cached_bytes_mean": "cached", "host_bytes_mean": "host"}
"""What live requests hold, what is kept for later ones, and what host memory keeps."""
TIMES = {"TTFT\np50": "ttft_p50_s", "TTFT\np99": "ttft_p99_s", "TPOT\np50": "tpot_p50_s"}


def print_capacity(console: Console, results: pd.DataFrame) -> None:
    """Residents by strategy and length, and the charge of the shortest request."""
    rows = results[results["phase"] == "capacity"]
    if rows.empty:
        return
    first = rows.iloc[0]
    _title(console, f"capacity: resident requests of {first['model']} in {budget_text(first)}, by length in tokens")
    lengths = list(dict.fromkeys(rows["workload"]))
    for part in _parts(lengths, (console.width - 30) // 8):
        table = _table()
        for name in part:
            table.add_column(f"{int(name.removeprefix('length=')):,}", justify="right")
        if part[0] == lengths[0]:
            table.add_column(f"MiB for\none of {lengths[0].removeprefix('length=')}", justify="right")
        for strategy, group in rows.groupby("strategy", sort=False):
            by_length = group.set_index("workload")
            cells = [f"{int(by_length.loc[name, 'residents_peak']):,}" for name in part]
            if part[0] == lengths[0]:
                charge = by_length.loc[lengths[0], "held_bytes_per_request"] / MIB
                cells.append("-" if math.isnan(charge) else f"{charge:.2f}")
            table.add_row(str(strategy), *cells)
        console.print(table)
    _note_ratios(console, rows)


def print_runs(console: Console, results: pd.DataFrame, phase: str) -> None:
    """For each stream, one line per strategy: means over its repetitions. The best rate among runs that served the same
    requests is bold."""
    of_phase = results[results["phase"] == phase]
    for workload, rows in of_phase.groupby("workload", sort=False):
        first = rows.iloc[0]
        title = f"{phase}: {workload}, {budget_text(first)}, {first['model']} on {first['device']}"
        if phase == "inference":
            title += f", {first['backend']} backend, {first['dtype']}"
        _print_run(console, rows, title, first["workload_source"])


def _print_run(console: Console, rows: pd.DataFrame, title: str, source: str) -> None:
    repetitions = rows["repetition"].nunique()
    means = rows.groupby("strategy", sort=False).mean(numeric_only=True)
    means["held_share"] = means["held_bytes_mean"] / means["budget_bytes"]
    means["recomputed"] = means["recomputed_tokens_preemption"] + means["recomputed_tokens_failure"]
    memory = {heading: means[column].map(text) for heading, (column, text) in MEMORY.items()}
    rates = means["output_tokens_per_s"]
    ranked = means["requests_served"] == means["requests_served"].max()
    ranked &= means.index.isin(competitors(list(means.index)))  # the bound is no competitor
    shown = rates.map(_count)
    speed = {"tok/s": shown.mask(ranked & (rates == rates[ranked].max()), "[bold]" + shown + "[/]")}
    if repetitions > 1:
        base = rows["strategy"].iloc[0]
        same = rows["requests_served"] == rows["requests_served"].max()
        intervals = paired_differences(rows[same], base)
        speed[f"against\n{base}"] = pd.Series({name: intervals.get(str(name), "-") for name in means.index})
    speed |= {heading: means[column].map(_seconds) for heading, column in TIMES.items()}
    if rows["tokens_sha256"].notna().any():
        speed["tokens"] = rows.groupby("strategy", sort=False)["tokens_sha256"].first().astype(str).str[:8]
    _title(console, title)
    for columns in [memory | speed] if console.width >= WIDE else [memory, speed]:
        table = _table()
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for strategy in means.index:
            table.add_row(str(strategy), *(cells[strategy] for cells in columns.values()))
        console.print(table)
    console.print(f"[dim]{source}[/]")
    if rows["requests_refused"].any():
        served = means["requests_served"]
        less = ", ".join(means.index[served < served.max()])
        console.print(
            f"tok/s is compared among strategies that served {served.max():,.0f} of {means['requests_offered'].max():,.0f} "
            f"requests" + (f"; not {less}: on requests that all hold, see the next table" if less else "")
        )
    if repetitions > 1:
        streams = ", each with a stream of its own" if rows["seed"].nunique() > 1 else ""
        console.print(f"means of {repetitions} repetitions{streams}; differences with 95 % intervals")
    _note_ratios(console, rows)


def paired_differences(rows: pd.DataFrame, base: str) -> dict[str, str]:
    """``+1.2 ± 0.3 %`` of output tokens a second against ``base``, by strategy: the mean over repetitions, which pair the
    same streams, and its 95 % interval (Student's t)."""
    rates = rows.pivot_table(index="repetition", columns="strategy", values="output_tokens_per_s", sort=False)
    found = {}
    for strategy in rates if base in rates else ():
        percent = 100 * (rates[strategy] / rates[base] - 1)
        half = half_interval(percent)
        found[str(strategy)] = "-" if strategy == base else f"{percent.mean():+.1f} ± {half:.1f} %"
    return found


def print_throughput(console: Console, results: pd.DataFrame) -> None:
    """Output tokens per second by strategy and workload, means over repetitions, with the most residents behind them."""
    first = results.iloc[0]
    title = (
        f"output tokens/s (residents at most): {first['model']}, {budget_text(first)}, {first['device']}, "
        f"{first['backend']} backend, {first['dtype']}, {first['state_dtype']} states"
    )
    workloads = list(dict.fromkeys(results["workload"]))
    means = results.groupby(["strategy", "workload"], sort=False)[["output_tokens_per_s", "residents_peak"]].mean()
    best = means["output_tokens_per_s"].groupby("workload").max()
    _title(console, title)
    for part in _parts(workloads, (console.width - 20) // 16):
        table = _table()
        for workload in part:
            of_workload = results[results["workload"] == workload].iloc[0]
            requests = int(of_workload["requests_served"])
            prompt, output = (int(of_workload[f"{kind}_tokens"]) // requests for kind in ("prompt", "output"))
            table.add_column(f"{workload}\n{requests} x {prompt:,}/{output:,}", justify="right")
        for strategy in dict.fromkeys(results["strategy"]):
            cells = []
            for workload in part:
                rate, residents = means.loc[(strategy, workload)]
                text = f"[bold]{rate:,.0f}[/]" if rate == best[workload] else f"{rate:,.0f}"
                cells.append(f"{text} ({residents:.0f})")
            table.add_row(str(strategy), *cells)
        console.print(table)
    _note_ratios(console, results)


def _note_ratios(console: Console, rows: pd.DataFrame) -> None:
    """Which options were searched, and what was found."""
    for strategy, found in rows.groupby("strategy", sort=False)["searched_options"].first().items():
        if found:
            console.print(f"[dim]{strategy}: {found}, searched by simulation[/]")


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]", highlight=False)


def _table() -> Table:
    """Of strategies; the caller adds what is said of them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    return table


def _parts(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


def print_reuse(console: Console, results: pd.DataFrame) -> None:
    """What was found, a line a policy set: bytes by kind in simulation, seconds of each round in inference."""
    for (phase, workload), rows in results.groupby(["phase", "workload"], sort=False):
        first, keys = rows.iloc[0], ["strategy", "policy"]
        _title(console, f"{phase}: {workload}, {budget_text(first)}, {first['model']} on {first['device']}")
        if phase == "inference":
            keys.append("conversations")
            values = rows.pivot_table(index=keys, columns="round", values="seconds", sort=False)
            values.columns = [f"round {number:.0f}" for number in values.columns]
        else:
            present = {name: text for name, text in BYTES_BY_KIND.items() if name in rows}
            values = rows.groupby(keys, sort=False)[list(present)].mean().rename(columns=present)
        sums = rows.groupby(keys, sort=False)[["hit_tokens", "prompt_tokens"]].sum()
        table = _table()
        for heading in (*keys[1:], "hit rate", *values.columns):
            table.add_column(heading, justify="left" if heading == "policy" else "right")
        text = _seconds if phase == "inference" else bytes_text
        for names, line in values.iterrows():
            rate = sums.at[names, "hit_tokens"] / sums.at[names, "prompt_tokens"]
            shown = [str(name) if isinstance(name, str) else f"{name:.0f}" for name in names]
            table.add_row(*shown, _share(rate), *("-" if pd.isna(value) else text(value) for value in line))
        console.print(table)


def print_league(console: Console, league: pd.DataFrame, claims: pd.DataFrame) -> None:
    """Differences of hit rates to the default, in points with their bands, by stream; then the claims."""
    _title(console, "hit rate less that of the default, in points (95 % band, paired); default: the rate itself")
    table = _table()
    streams = list(dict.fromkeys(league["workload"]))
    for name in streams:
        table.add_column(name, justify="right")
    for policy, rows in league.groupby("policy", sort=False):
        by_stream = rows.set_index("workload")
        table.add_row(
            str(policy),
            *(_gain(by_stream.loc[name], str(policy)) if name in by_stream.index else "-" for name in streams),
        )
    console.print(table)
    for claim, rows in claims.groupby("claim", sort=False):
        console.print(f"\n{claim}", markup=False)
        for row in rows.itertuples():
            points = "" if pd.isna(row.difference) else f"{100 * row.difference:+.1f} points: "
            console.print(f"  {f'{row.workload}: ' if row.workload else ''}{points}{row.verdict}", markup=False)


def _gain(row: pd.Series, policy: str) -> str:
    if policy == "default":
        return _share(row["hit_rate"])
    return f"{100 * row['difference']:+.1f} ({100 * row['difference_low']:+.1f} {100 * row['difference_high']:+.1f})"
