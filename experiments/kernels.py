"""Experiment ``kernels``: every cache operation against its reference, the torch backend, installed peers and the device's
ceilings.

On CUDA at the shapes of Qwen3-Next-80B-A3B. On a CPU it is functional only: tiny shapes on the torch backend, checked by the
naive references; its times claim nothing.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from benchmarks import peers
from benchmarks.case import OPERATIONS, Case, cpu_cases, cuda_cases, fast_cuda_cases, select
from benchmarks.kernel_figures import fraction_of_ceiling, relative_errors, row_label
from benchmarks.measure import Bench, Row, compile_case, failed, isolated_ceilings
from benchmarks.processes import in_parallel, isolated
from benchmarks.timing import Ceilings
from benchmarks.work import Setup
from experiments.lib.harness import CONSOLE, ProgressBar, write_results
from experiments.lib.settings import Common
from hybridcache.device import choose_device
from hybridcache.errors import bad
from hybridcache.observe.environment import device_name, environment
from hybridcache.observe.report import style
from hybridcache.observe.report.page import Picture, Section, save_picture, write_page
from hybridcache.observe.report.units import bytes_text

FUNCTIONAL = "functional, not a timing claim"
RATES = ("bytes", "GB/s", "TFLOP/s", "of ceiling", "rel error", "clock x launches")
HEADINGS = ("operation", "shape", "impl", "L2", "ms", "±", *RATES)


@dataclass
class Settings:
    device: str
    operations: list[str]
    isolate: str | bool
    limit_s: float


@dataclass
class Config(Common):
    """What the experiment reads."""

    seed: int
    kernels: Settings


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Measure; write ``kernels.json`` and ``results.parquet`` after every row, then figures and the report.

    Raises:
        UserError: an unknown operation or device, before anything is measured.
        RuntimeError: at the end, where an operation failed or gave a wrong result; everything else was measured and written.
    """
    settings = cfg.kernels
    device = choose_device(settings.device)
    on_cuda = device.type == "cuda"
    cases = _cases(list(settings.operations), on_cuda, cfg.fast)
    isolate = on_cuda if settings.isolate == "auto" else bool(settings.isolate)
    record = Record(run_dir, cfg, on_cuda)
    if on_cuda:
        for line in in_parallel(compile_case, cases):
            CONSOLE.print(f"does not compile: {line}", markup=False)
        record.ceilings = isolated_ceilings(settings.limit_s)
    if not on_cuda:
        torch.set_num_threads(1)
    bench = Bench(Setup.on(device, cfg.seed), record.ceilings)
    with ProgressBar(32) as progress:
        task = progress.add_task("kernels", total=len(cases))
        if isolate:
            for row in isolated(bench.rows, cases, failed, limit_s=settings.limit_s):
                record.add(row)
                progress.update(task, completed=record.cases, description=f"{row['op']} {row['shape']}")
        else:
            for case in cases:
                for row in bench.rows(case):
                    record.add(row)
                progress.update(task, advance=1, description=case.operation)
    results = record.results()
    _show(record, results, run_dir)
    errors = [row for row in record.rows if row["error"]]
    if errors:
        first = errors[0]
        raise RuntimeError(
            f"{len(errors)} of {len(record.rows)} measurements failed, the first: {first['op']} {first['shape']} "
            f"{first['impl']}: {first['error']}"
        )
    return results


def _cases(operations: list[str], on_cuda: bool, fast: bool) -> list[Case]:
    for name in operations:
        if name not in OPERATIONS:
            raise bad("kernels.operations", name, f"choose some of {', '.join(OPERATIONS)}, or none for all")
    cases = select((fast_cuda_cases() if fast else cuda_cases()) if on_cuda else cpu_cases(), operations)
    if not cases:
        raise bad("kernels.operations", operations, "have no form on a CPU; choose others or device cuda")
    return cases


class Record:
    """What is measured so far, on disk after every row."""

    def __init__(self, run_dir: Path, cfg: DictConfig, on_cuda: bool) -> None:
        self.run_dir, self.experiment, self.on_cuda = run_dir, cfg.experiment_name, on_cuda
        self.device = device_name() if on_cuda else "cpu"
        self.model = "qwen3_next_80b_a3b" if on_cuda else "tiny"
        self.environment = environment()
        self.peers = peers.states()
        self.ceilings: Ceilings | None = None
        self.rows: list[Row] = []

    @property
    def cases(self) -> int:
        """Distinct cases that have a row."""
        keys = ("op", "shape", "dtype", "kernel_block", "manager_block", "layout")
        return len({tuple(row[key] for key in keys) for row in self.rows})

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if row["error"]:
            CONSOLE.print(f"[red]{row['op']} {row['shape']} {row['impl']}[/]: {row['error']}", markup=True)
        whole = {
            "environment": self.environment,
            "device": self.device,
            "claim": "measured" if self.on_cuda else FUNCTIONAL,
            "ceilings": vars(self.ceilings) if self.ceilings else None,
            "peers": self.peers,
            "rows": self.rows,
        }
        target = self.run_dir / "kernels.json"
        part = target.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1, default=str) + "\n")
        os.replace(part, target)
        self.results()

    def results(self) -> pd.DataFrame:
        """``results.parquet``: the rows with the columns that every experiment has."""
        return write_results([self._full(row) for row in self.rows], self.run_dir)

    def _full(self, row: Row) -> dict[str, Any]:
        blocks = (
            [f"kb={row['kernel_block']}", f"Tm={row['manager_block']}", row["layout"]] if row["kernel_block"] else []
        )
        where = [row["op"], row["shape"], row["dtype"], *blocks, *([row["l2"]] if row["l2"] else [])]
        names = {"phase": "kernels", "strategy": row["impl"], "workload": " ".join(map(str, where)), "repetition": 0}
        return {"experiment": self.experiment, **names, "device": self.device, "model": self.model, **row}


# -- tables, figures, page ---------------------------------------------------------------------------------------------


def _show(record: Record, results: pd.DataFrame, run_dir: Path) -> None:
    title = f"kernels, {record.device}" + ("" if record.on_cuda else f": {FUNCTIONAL}")
    table = Table(title=title, box=box.SIMPLE_HEAD)
    groups = [[cells[:-1] for cells in _cells(rows)] for _, rows in results.groupby("op", sort=False)]
    for i, name in enumerate(HEADINGS[:-1]):
        # A figure is never cut short, whatever becomes of the names.
        widest = max(len(cells[i]) for group in groups for cells in group) if i > 2 else None
        table.add_column(name, justify="right" if i > 2 else "left", no_wrap=True, min_width=widest)
    for group in groups:
        for cells in group:
            table.add_row(*cells)
        table.add_section()
    CONSOLE.print(table)
    absent = [f"{name} ({text})" for name, text in record.peers.items() if text != "installed"]
    if absent:
        CONSOLE.print(f"peers that are not here: {', '.join(absent)}", markup=False)
    pictures = _pictures(results, run_dir / "figures")
    write_page(run_dir, "Kernels", _about(record), _sections(record, results, pictures))


def _cells(rows: pd.DataFrame) -> list[list[str]]:
    """One line per row of one operation."""
    lines = []
    for _, row in rows.iterrows():
        name = [row["op"], row_label(row), row["impl"]]
        if pd.notna(row["error"]):
            lines.append([*name, *["failed"] * 2, *["-"] * (len(HEADINGS) - 5)])
            continue
        rates = ["-"] * 4
        if pd.notna(row["gbps"]):
            rates = [
                f"{row['spread']:.0%}",
                f"{row['gbps']:,.0f}" if row["gbps"] >= 10 else f"{row['gbps']:.2g}",
                f"{row['tflops']:,.1f}" if row["tflops"] >= 0.1 else f"{row['tflops']:.1g}",
                "-" if pd.isna(row["fraction"]) else f"{row['fraction']:.0%} {row['bound']}",
            ]
        timed = pd.notna(row["median_ms"])
        found = [row["l2"] if pd.notna(row["l2"]) else "-", f"{row['median_ms']:.4f}" if timed else "-", rates[0]]
        found += [bytes_text(row["bytes"]), *rates[1:], f"{row['rel_error']:.1e}"]
        lines.append([*name, *found, f"{row['clock']} x {int(row['launches'])}" if timed else "-"])
    return lines


CAPTIONS = {
    "fraction": "The least time that a measured ceiling allows (device copy, bf16 matrix product, host link) over the median "
    "time. 100 % is the ceiling; a mark beyond it had its data in the L2 cache.",
    "error": "Norm of the difference from a float64 reference over the norm of the reference, on fresh random inputs.",
}


def _pictures(results: pd.DataFrame, folder: Path) -> list[Picture]:
    drawings = {"fraction": ("fraction", fraction_of_ceiling), "error": ("rel_error", relative_errors)}
    with style.styled():
        return [
            save_picture(folder, f"kernels_{name}", *draw(results), CAPTIONS[name])
            for name, (column, draw) in drawings.items()
            if results[column].notna().any()
        ]


def _about(record: Record) -> list[str]:
    if record.ceilings is None:
        return [f"Device cpu: {FUNCTIONAL}. Tiny shapes on the torch backend, checked by the naive references."]
    at = record.ceilings
    return [
        f"{record.device}, shapes of Qwen3-Next-80B-A3B. Measured ceilings: copy {at.copy_bytes / 1e12:.2f} TB/s, bf16 matrix "
        f"product {at.matmul_flops / 1e12:.0f} TFLOP/s, host link {at.to_host_bytes / 1e9:.0f} out and "
        f"{at.from_host_bytes / 1e9:.0f} GB/s in.",
        "Times are medians of one launch among those of a CUDA graph, each on memory of its own (clock: graph), or of single "
        "calls by events. Cold: a launch's data was evicted from the L2 cache by the launches before it. Warm: it was not.",
    ]


def _sections(record: Record, results: pd.DataFrame, pictures: list[Picture]) -> list[Section]:
    overview = Section("Overview", figures=pictures)
    overview.texts = [f"Peer {name}: {text}." for name, text in record.peers.items()]
    failures = [f"{row['op']} {row['shape']} {row['impl']}: {row['error']}" for row in record.rows if row["error"]]
    parts = [overview]
    if failures:
        parts.append(Section("Failures", failures))
    for op, rows in results.groupby("op", sort=False):
        cells = [line[1:] for line in _cells(rows)]
        parts.append(Section(str(op), headings=HEADINGS[1:], rows=cells))
    return parts
