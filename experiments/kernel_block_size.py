"""Experiment ``kernel_block_size``: what it costs when the kernels' block is the manager's, and what it costs when it is not.

Three phases: *resources* (shared memory, registers and spills of attention kernels whose tile is the page, or is not, over
kernel blocks; compiled for sm_90), *tables* (host time and bytes of expanding a table of manager blocks) and, on CUDA,
*time* of the same kernels.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from benchmarks import block_size, kernel_figures
from benchmarks.block_tables import WAYS, measure_table
from benchmarks.measure import Bench, Row, describe, failed
from benchmarks.processes import each_in_parallel, in_parallel, isolated
from benchmarks.resources import SHARED_MEMORY_LIMIT, Resources
from benchmarks.work import Setup
from experiments.lib.harness import CONSOLE, ProgressBar, write_results
from experiments.lib.settings import Common
from hybridcache.device import choose_device
from hybridcache.errors import bad
from hybridcache.observe.environment import device_name
from hybridcache.observe.report import style
from hybridcache.observe.report.page import Section, save_picture, write_page
from hybridcache.observe.report.units import bytes_text, seconds_text

Rows = Iterator[Row]

FAST = {
    "operations": ["paged_decode"],
    "blocks": [16, 256],
    "tables": {"geometries": [[1056, 16]], "batches": [1, 64], "lengths": [1024, 65536]},
}


@dataclass
class Tables:
    geometries: list[list[int]]
    batches: list[int]
    lengths: list[int]


@dataclass
class Settings:
    operations: list[str]
    blocks: list[int]
    compile_up_to: int
    device: str
    decode: list[int]
    prefill: list[int]
    tables: Tables
    limit_s: float


@dataclass
class Config(Common):
    """What the experiment reads."""

    seed: int
    kernel_block_size: Settings


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Write ``results.parquet`` (after every row), figures and the report.

    A kernel that needs more shared memory than there is gives a row, not an error.

    Raises:
        UserError: a setting that makes no sense, before anything is compiled.
        RuntimeError: at the end, where a kernel failed for another reason or gave a wrong result.
    """
    settings = {**cfg.kernel_block_size, **(FAST if cfg.fast else {})}
    device = choose_device(settings["device"])
    _check(settings)
    device_text = device_name() if device.type == "cuda" else "cpu"
    phases: dict[str, tuple[int, Callable[[], Rows]]] = {
        "resources": (2 * len(settings["operations"]) * len(settings["blocks"]), lambda: _resources(settings)),
        "tables": (_table_count(settings["tables"]), lambda: _tables(settings["tables"], cfg.seed)),
    }
    if device.type == "cuda":
        timed = list(_timed(settings))
        phases["time"] = (len(timed), lambda: _times(timed, Setup.on(device, cfg.seed), settings["limit_s"]))
    rows: list[Row] = []
    with ProgressBar(12) as progress:
        for phase, (total, produce) in phases.items():
            task = progress.add_task(phase, total=total)
            for row in produce():
                common = {"experiment": cfg.experiment_name, "phase": phase, "repetition": 0, "device": device_text}
                rows.append({**common, "model": "qwen3_next_80b_a3b", **row})
                if phase != "tables":
                    write_results(rows, run_dir)  # what is measured is not lost
                progress.advance(task)
            progress.update(task, completed=total)
    results = write_results(rows, run_dir)
    _show(results, run_dir)
    errors = [row for row in rows if row.get("error") and not row.get("overflow")]
    if errors:
        raise RuntimeError(
            f"{len(errors)} measurements failed, the first: {errors[0]['workload']}: {errors[0]['error']}"
        )
    return results


def _check(settings: dict[str, Any]) -> None:
    for name in settings["operations"]:
        if name not in block_size.OPERATIONS:
            raise bad("kernel_block_size.operations", name, f"choose some of {', '.join(block_size.OPERATIONS)}")
    for size in settings["blocks"]:
        if not isinstance(size, int) or size < 8 or size % 8:
            raise bad("kernel_block_size.blocks", size, "give multiples of 8 tokens")
    for manager, kernel in settings["tables"]["geometries"]:
        if kernel < 1 or manager % kernel:
            raise bad(
                "kernel_block_size.tables.geometries", [manager, kernel], "the kernel block must divide the other"
            )
    for key in ("batches", "lengths"):
        for value in settings["tables"][key]:
            if not isinstance(value, int) or value < 1:
                raise bad(f"kernel_block_size.tables.{key}", value, "give positive whole numbers")


# -- phases ------------------------------------------------------------------------------------------------------------


def _resources(settings: dict[str, Any]) -> Rows:
    """Both kinds of kernel at every block size: compiled, or bounded from below where that would take minutes."""
    points = list(itertools.product(settings["operations"], settings["blocks"], block_size.KINDS))
    compiled = [
        (op, size, kind) for op, size, kind in points if kind == "independent" or size <= settings["compile_up_to"]
    ]
    # Where the machine has cores to spare, side by side; on CUDA the kernels that are timed later then lie in Triton's cache.
    spare = (os.cpu_count() or 1) // 2
    found = each_in_parallel(_compile, compiled, spare) if spare > 1 else map(_compile_here, compiled)
    for operation, size, kind in points:
        row: Row = {"strategy": kind, "workload": f"{operation} kb={size}", "operation": operation}
        row |= {"kernel_block": size, "compiled": (operation, size, kind) in compiled}
        if not row["compiled"]:
            row["shared_bytes"] = block_size.tile_bytes(size)
        elif isinstance(result := next(found), Exception):
            row["error"] = describe(result)
        else:
            row |= vars(result)
        if "shared_bytes" in row:
            row["overflow"] = row["shared_bytes"] > SHARED_MEMORY_LIMIT
        yield row


def _compile(point: tuple[str, int, str]) -> Resources:
    operation, size, kind = point
    return block_size.resources(kind, operation, size)


def _compile_here(point: tuple[str, int, str]) -> Resources | Exception:
    try:
        return _compile(point)
    except Exception as error:  # one kernel must not hide the others; its row says what happened
        return error


def _table_count(tables: Any) -> int:
    return len(tables["geometries"]) * len(tables["batches"]) * len(tables["lengths"]) * len(WAYS)


def _tables(tables: Any, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    points = itertools.product(tables["geometries"], tables["batches"], tables["lengths"], WAYS)
    for (manager, kernel), batch, length, way in points:
        seconds, num_bytes = measure_table(way, batch, length, manager, kernel, generator)
        place = {"manager_block": manager, "kernel_block": kernel, "batch": batch, "length": length}
        text = f"manager={manager} kernel={kernel} batch={batch} length={length}"
        yield {"strategy": way, "workload": text, **place, "host_s": seconds, "table_bytes": num_bytes}


def _timed(settings: dict[str, Any]) -> Iterator[block_size.Timed]:
    shapes = {"paged_decode": settings["decode"], "paged_prefill": settings["prefill"]}
    for operation in settings["operations"]:
        rows, tokens = shapes[operation]
        for size in settings["blocks"]:
            yield block_size.Timed(operation, rows, tokens, size, size <= settings["compile_up_to"])


def _times(timed: list[block_size.Timed], setup: Setup, limit_s: float) -> Rows:
    """In a process of its own: a kernel that crashes costs only its own row. What is timed is compiled before, side by side."""
    for line in in_parallel(block_size.launch_once, timed):
        CONSOLE.print(f"does not compile: {line}", markup=False)
    bench = Bench(setup, None)
    rows = isolated(
        partial(block_size.timed_rows, bench), timed, lambda at, text: failed(at.case, text), limit_s=limit_s
    )
    for row in rows:
        overflow = bool(row["error"]) and any(words in row["error"] for words in block_size.OUT_OF_MEMORY)
        label = f"{row['op']} {row['shape']} kb={row['kernel_block']}"
        yield {"strategy": row["impl"], "workload": label, "operation": row["op"], **row, "overflow": overflow}


# -- tables, figures, page ---------------------------------------------------------------------------------------------


def _show(results: pd.DataFrame, run_dir: Path) -> None:
    sections = []
    for phase, make in {"resources": _resource_section, "time": _time_section, "tables": _table_section}.items():
        rows = results[results["phase"] == phase].dropna(axis=1, how="all")
        if not rows.empty:
            sections.append(make(rows, run_dir / "figures"))
    for section in sections:
        table = Table(title=section.title, box=box.SIMPLE_HEAD)
        for heading in section.headings:
            table.add_column(heading, justify="left" if heading in ("kernel", "operation", "way") else "right")
        for cells in section.rows:
            table.add_row(*cells)
        CONSOLE.print(table)
    about = [
        "A manager block is what memory is allotted in; a kernel block is what kernels address. Where they are one, a larger "
        "manager block (one that holds a recurrent state) makes kernels whose tile is the page need more shared memory than "
        "there is. Where they differ, either the table is expanded on the host, or the kernels read it as it is."
    ]
    write_page(run_dir, "Kernel block size", about, sections)


def _resource_section(rows: pd.DataFrame, folder: Path) -> Section:
    headings = ("operation", "kernel", "block", "shared memory, B", "of the limit", "registers", "spills, B")
    section = Section("Resources of a program (sm_90)", headings=headings)
    for _, row in rows.iterrows():
        start = [row["operation"], row["strategy"], f"{row['kernel_block']:,.0f}"]
        if pd.isna(row.get("shared_bytes")):
            section.rows.append([*start, str(row["error"]), *"---"])
            continue
        shared = f"{'' if row['compiled'] else 'at least '}{row['shared_bytes']:,.0f}"
        share = f"{row['shared_bytes'] / SHARED_MEMORY_LIMIT:.0%}{' overflow' if row['overflow'] else ''}"
        section.rows.append([*start, shared, share, _count(row.get("registers")), _count(row.get("spill_bytes"))])
    known = rows.dropna(subset="shared_bytes") if "shared_bytes" in rows else rows.iloc[:0]
    if not known.empty:
        caption = (
            f"Shared memory of one program over the tokens of a kernel block; the line is the limit of {SHARED_MEMORY_LIMIT:,} "
            "B. Hollow: not compiled, the least that one tile of K and one of V need. Head dim 256, 16 query and 2 KV heads."
        )
        _draw(section, folder, "shared_memory", kernel_figures.shared_memory, known, caption)
    return section


def _time_section(rows: pd.DataFrame, folder: Path) -> Section:
    headings = ("operation", "kernel", "block", "L2", "ms", "±", "GB/s", "TFLOP/s", "rel error", "note")
    section = Section("Time", headings=headings)
    for _, row in rows.iterrows():
        start = [row["workload"], row["strategy"], str(row["kernel_block"])]
        if pd.isna(row.get("median_ms")):
            note = "needs too much shared memory" if row["overflow"] else row["error"]
            section.rows.append([*start, *["-"] * 6, note])
            continue
        times = [str(row["l2"]), f"{row['median_ms']:.4f}", f"{row['spread']:.0%}"]
        section.rows.append(
            [*start, *times, f"{row['gbps']:,.0f}", f"{row['tflops']:,.1f}", f"{row['rel_error']:.1e}", ""]
        )
    if "median_ms" in rows:
        caption = "Median time of one launch; a cross at the top: the kernel needs more shared memory than there is."
        _draw(section, folder, "time", kernel_figures.time, rows, caption)
    return section


def _table_section(rows: pd.DataFrame, folder: Path) -> Section:
    headings = ("way", "manager / kernel", "requests", "tokens", "host time", "table")
    section = Section("Tables of a step", headings=headings)
    ends = {name: [rows[name].min(), rows[name].max()] for name in ("batch", "length")}
    for _, row in rows[rows["batch"].isin(ends["batch"]) & rows["length"].isin(ends["length"])].iterrows():
        geometry = f"{row['manager_block']:.0f} / {row['kernel_block']:.0f}"
        sizes = [f"{row['batch']:,.0f}", f"{row['length']:,.0f}"]
        cost = [seconds_text(row["host_s"]), bytes_text(row["table_bytes"])]
        section.rows.append([row["strategy"], geometry, *sizes, *cost])
    section.texts = [f"The smallest and the largest batch and length; results.parquet has all. {WAYS_TEXT}"]
    caption = (
        "Host time to build one step's table of the largest batch, and its bytes, which are then copied to the device."
    )
    _draw(section, folder, "table_cost", kernel_figures.table_cost, rows, caption)
    return section


def _draw(section: Section, folder: Path, name: str, draw: Any, rows: pd.DataFrame, caption: str) -> None:
    with style.styled():
        figure, data = draw(rows)
        section.figures.append(save_picture(folder, name, figure, data, caption))


WAYS_TEXT = (
    "loop: requests expanded one after another; broadcast: the batch at once; "
    "none: kernels read the table of manager blocks."
)


def _count(value: Any) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:,.0f}"
