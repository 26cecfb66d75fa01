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

from benchmarks import block_size, kernel_figures
from benchmarks.block_tables import WAYS, measure_table
from benchmarks.kernel_figures import cell
from benchmarks.measure import Bench, Row, failed
from benchmarks.processes import describe, each_in_parallel, in_parallel, isolated
from benchmarks.resources import SHARED_MEMORY_LIMIT, Resources
from benchmarks.work import Setup
from experiments.lib.harness import CONSOLE, ProgressBar, write_results
from experiments.lib.settings import Common
from hybridcache.device import choose_device
from hybridcache.errors import bad
from hybridcache.observe.environment import device_name
from hybridcache.observe.report.page import Section, save_picture
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
        "tables": (len(_table_points(settings["tables"])), lambda: _tables(settings["tables"], cfg.seed)),
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
    # Side by side; on CUDA the kernels that are timed later then lie in Triton's cache.
    found = each_in_parallel(_compile, compiled, max((os.cpu_count() or 1) // 2, 1))
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


def _table_points(tables: Any) -> list[tuple[Any, ...]]:
    return list(itertools.product(tables["geometries"], tables["batches"], tables["lengths"], WAYS))


def _tables(tables: Any, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    for (manager, kernel), batch, length, way in _table_points(tables):
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

ABOUT = (
    "A manager block is what memory is allotted in; a kernel block is what kernels address. Where they are one, a larger "
    "manager block (one that holds a recurrent state) makes kernels whose tile is the page need more shared memory than "
    "there is. Where they differ, either the table is expanded on the host, or the kernels read it as it is."
)
CAPTIONS = {
    "shared_memory": "Shared memory of one program over the tokens of a kernel block; the line is the limit of "
    f"{SHARED_MEMORY_LIMIT:,} B. White: not compiled, the least that one tile of K and one of V need. Head dim 256, 16 query "
    "and 2 KV heads.",
    "time": "Median time of one launch; a cross at the top: the kernel needs more shared memory than there is.",
    "table_cost": "Host time to build one step's table of the largest batch, and its bytes, which are copied to the device.",
}
WAYS_TEXT = (
    "The smallest and the largest batch and length; results.parquet has all. loop: requests expanded one after another; "
    "broadcast: the batch at once; none: kernels read the table of manager blocks."
)


def _show(results: pd.DataFrame, run_dir: Path) -> None:
    """Print, draw and write what every phase found: its section, and the figure of its rows that have a value."""
    sections = []
    for phase, make, value, draw in (
        ("resources", _resource_section, "shared_bytes", kernel_figures.shared_memory),
        ("time", _time_section, "median_ms", kernel_figures.time),
        ("tables", _table_section, "host_s", kernel_figures.table_cost),
    ):
        rows = results[results["phase"] == phase]
        if rows.empty:
            continue
        sections.append(section := make(rows))
        if rows.get(value, pd.Series(dtype=float)).notna().any():
            figure, data = draw(rows.dropna(subset=value) if phase == "resources" else rows)
            name = draw.__name__
            section.figures.append(save_picture(run_dir / "figures", name, figure, data, CAPTIONS[name]))
    kernel_figures.show(CONSOLE, run_dir, "Kernel block size", [ABOUT], sections)


def _resource_section(rows: pd.DataFrame) -> Section:
    headings = ("operation", "kernel", "block", "shared memory, B", "of the limit", "registers", "spills, B")
    section = Section("Resources of a program (sm_90)", headings=headings)
    for _, row in rows.iterrows():
        start = [row["operation"], row["strategy"], f"{row['kernel_block']:,.0f}"]
        if pd.isna(row.get("shared_bytes")):
            section.rows.append([*start, str(row["error"]), *"---"])
            continue
        shared = f"{'' if row['compiled'] else 'at least '}{row['shared_bytes']:,.0f}"
        share = f"{row['shared_bytes'] / SHARED_MEMORY_LIMIT:.0%}{' overflow' if row['overflow'] else ''}"
        counts = [cell(row.get(name), ",.0f") for name in ("registers", "spill_bytes")]
        section.rows.append([*start, shared, share, *counts])
    return section


def _time_section(rows: pd.DataFrame) -> Section:
    forms = {"L2": ("l2", ""), "ms": ("median_ms", ".4f"), "±": ("spread", ".0%"), "GB/s": ("gbps", ",.0f")}
    forms |= {"TFLOP/s": ("tflops", ",.1f"), "rel error": ("rel_error", ".1e")}
    section = Section("Time", headings=("operation", "kernel", "block", *forms, "note"))
    for _, row in rows.iterrows():
        note = "needs too much shared memory" if row["overflow"] else cell(row.get("error"))
        cells = [cell(row.get(name), form) for name, form in forms.values()]
        section.rows.append([row["workload"], row["strategy"], f"{row['kernel_block']:.0f}", *cells, note])
    return section


def _table_section(rows: pd.DataFrame) -> Section:
    headings = ("way", "manager / kernel", "requests", "tokens", "host time", "table")
    section = Section("Tables of a step", [WAYS_TEXT], headings=headings)
    ends = {name: [rows[name].min(), rows[name].max()] for name in ("batch", "length")}
    for _, row in rows[rows["batch"].isin(ends["batch"]) & rows["length"].isin(ends["length"])].iterrows():
        geometry = f"{row['manager_block']:.0f} / {row['kernel_block']:.0f}"
        sizes = [f"{row['batch']:,.0f}", f"{row['length']:,.0f}"]
        cost = [seconds_text(row["host_s"]), bytes_text(row["table_bytes"])]
        section.rows.append([row["strategy"], geometry, *sizes, *cost])
    return section
