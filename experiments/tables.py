"""Result tables on the terminal."""

import math

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

MIB, GIB = 1 << 20, 1 << 30


def print_capacity(console: Console, results: pd.DataFrame) -> None:
    """Residents by strategy and length, and the charge of the shortest request."""
    rows = results[results["phase"] == "capacity"]
    if rows.empty:
        return
    budget = rows["budget_bytes"].iloc[0]
    table = Table(
        title=f"capacity: resident requests in {budget / GIB:g} GiB, by length in tokens", box=box.SIMPLE_HEAD
    )
    table.add_column("strategy", no_wrap=True)
    workloads = list(dict.fromkeys(rows["workload"]))
    lengths = [name.removeprefix("length=") for name in workloads]
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right")
    table.add_column(f"MiB for one of {lengths[0]}", justify="right")
    for strategy, group in rows.groupby("strategy", sort=False):
        by_workload = group.set_index("workload")
        counts = [f"{int(by_workload.loc[name, 'residents_peak']):,}" for name in workloads]
        charge = by_workload.loc[workloads[0], "held_bytes_per_request"] / MIB
        table.add_row(str(strategy), *counts, "-" if math.isnan(charge) else f"{charge:.2f}")
    console.print(table)


def print_runs(console: Console, results: pd.DataFrame, phase: str) -> None:
    """One line per strategy and repetition of a phase that ran requests."""
    rows = results[results["phase"] == phase]
    if rows.empty:
        return
    first = rows.iloc[0]
    title = (
        f"{phase}: {first['workload']}, {first['model']}, {first['requests_offered']:.0f} requests, "
        f"{_bytes(first['budget_bytes'])} budget, {first['device']}"
    )
    if phase == "inference":
        title += f", {first['backend']} backend, {first['dtype']}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    for name in ("residents", "useful", "held", "preempted", "recomputed", "tok/s", "TTFT p50", "p99", "TPOT p50"):
        table.add_column(name, justify="right", no_wrap=True)
    real = phase == "inference"
    if real:
        table.add_column("tokens", no_wrap=True)
    best = rows["output_tokens_per_s"].max()
    for row in rows.itertuples():
        rate = f"{row.output_tokens_per_s:,.0f}"
        cells = [
            str(row.strategy),
            f"{row.residents_peak:.0f}",
            f"{100 * row.utilization_mean:.1f} %",
            f"{100 * row.held_bytes_mean / row.budget_bytes:.1f} %",
            f"{row.preemptions:.0f}",
            f"{row.recomputed_tokens_preemption + row.recomputed_tokens_failure:,.0f}",
            f"[bold]{rate}[/]" if row.output_tokens_per_s == best else rate,
            _seconds(row.ttft_p50_s),
            _seconds(row.ttft_p99_s),
            _seconds(row.tpot_p50_s),
        ]
        if real:
            cells.append(str(row.tokens_sha256)[:8])
        table.add_row(*cells)
    console.print(table)


def print_throughput(console: Console, results: pd.DataFrame) -> None:
    """Output tokens per second by strategy and workload, means over repetitions, with the most residents behind them."""
    first = results.iloc[0]
    table = Table(
        title=f"output tokens/s (residents at most): {first['model']}, {_bytes(first['budget_bytes'])} of cache, "
        f"{first['device']}, {first['backend']} backend, {first['dtype']}, {first['state_dtype']} states",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("strategy", no_wrap=True)
    workloads = list(dict.fromkeys(results["workload"]))
    for workload in workloads:
        of_workload = results[results["workload"] == workload].iloc[0]
        requests = int(of_workload["requests_served"])
        prompt, output = (int(of_workload[f"{kind}_tokens"]) // requests for kind in ("prompt", "output"))
        table.add_column(f"{workload}\n{requests} x {prompt:,}/{output:,}", justify="right")
    columns = ["output_tokens_per_s", "residents_peak"]
    means = results.groupby(["strategy", "workload"], sort=False)[columns].mean()
    best = means["output_tokens_per_s"].groupby("workload").max()
    for strategy in dict.fromkeys(results["strategy"]):
        cells = []
        for workload in workloads:
            rate, residents = means.loc[(strategy, workload)]
            text = f"{rate:,.0f}"
            cells.append(
                f"[bold]{text}[/] ({residents:.0f})" if rate == best[workload] else f"{text} ({residents:.0f})"
            )
        table.add_row(str(strategy), *cells)
    console.print(table)


def _bytes(value: float) -> str:
    return f"{value / GIB:.3g} GiB" if value >= GIB else f"{value / MIB:.3g} MiB"


def _seconds(value: float) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.2f} s" if value >= 0.9995 else f"{1000 * value:.3g} ms"
