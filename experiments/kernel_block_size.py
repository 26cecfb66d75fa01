"""Experiment ``kernel_block_size``: what it costs when the kernels' block is the manager's.

Two phases: *resources* (shared memory, registers and spills of attention kernels whose tile is the page, or is not, over
kernel blocks; compiled for sm_90) and, on CUDA, *time* of the same kernels. What it costs the host where the blocks differ
and tables must be expanded is operation ``table_expansion`` of experiment ``kernels``.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from benchmarks import block_size, kernel_figures
from benchmarks.case import Case
from benchmarks.measure import Bench, Row, failed
from benchmarks.processes import describe, each_in_parallel, in_parallel, isolated
from benchmarks.resources import SHARED_MEMORY_LIMIT, Resources
from benchmarks.work import Setup
from experiments.lib.harness import CONSOLE, ProgressBar, write_results
from experiments.lib.settings import Common
from experiments.lib.strategy_choices import stored_columns
from hybridcache.device import choose_device
from hybridcache.errors import bad
from hybridcache.observe.environment import device_name
from hybridcache.observe.report.page import save_picture
from hybridcache.observe.report.style import Drawn
from hybridcache.spec.dtypes import dtype_name

Rows = Iterator[Row]

FAST = {"operations": ["paged_decode"], "blocks": [16, 256]}


@dataclass
class Settings:
    operations: list[str]
    blocks: list[int]
    compile_up_to: int
    device: str
    decode: list[int]
    prefill: list[int]
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
        "resources": (2 * len(settings["operations"]) * len(settings["blocks"]), lambda: _resources(settings))
    }
    if device.type == "cuda":
        timed, limits = _timed(settings), (settings["compile_up_to"], settings["limit_s"])
        phases["time"] = (len(timed), lambda: _times(timed, Setup.on(device, cfg.seed), *limits))
    rows: list[Row] = []
    with ProgressBar(12) as progress:
        for phase, (total, produce) in phases.items():
            task = progress.add_task(phase, total=total)
            for row in produce():
                common = {"experiment": cfg.experiment_name, "phase": phase, "repetition": 0, "device": device_text}
                stored = stored_columns(dtype_name(block_size.DTYPE), None)
                rows.append({**common, "model": "qwen3_next_80b_a3b", "seed": cfg.seed, **stored, **row})
                results = write_results(rows, run_dir)  # what is measured is not lost
                progress.advance(task)
            progress.update(task, completed=total)
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


def _timed(settings: dict[str, Any]) -> list[Case]:
    shapes = {"paged_decode": settings["decode"], "paged_prefill": settings["prefill"]}
    points = [(name, *shapes[name], size) for name in settings["operations"] for size in settings["blocks"]]
    return list(itertools.starmap(block_size.timed_case, points))


def _times(timed: list[Case], setup: Setup, up_to: int, limit_s: float) -> Rows:
    """In a process of its own: a kernel that crashes costs only its own row. What is timed is compiled before, side by side."""
    for line in in_parallel(partial(block_size.compile_timed, up_to), timed):
        CONSOLE.print(f"does not compile: {line}", markup=False)
    for row in isolated(partial(block_size.timed_rows, Bench(setup, None), up_to), timed, failed, limit_s=limit_s):
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
}


SECTIONS: dict[str, tuple[str, str, Callable[[pd.DataFrame], Drawn], dict[str, str]]] = {
    "resources": (
        "Resources of a program (sm_90)", "shared_bytes", kernel_figures.shared_memory,
        {"operation": "operation", "strategy": "kernel", "kernel_block": "block", "compiled": "compiled", "shared_bytes":
         "shared memory, B", "overflow": "overflow", "registers": "registers", "spill_bytes": "spills, B", "error": "error"},
    ),
    "time": (
        "Time", "median_ms", kernel_figures.time,
        {"workload": "operation", "strategy": "kernel", "l2": "L2", "median_ms": "ms", "spread": "±", "gbps": "GB/s",
         "tflops": "TFLOP/s", "rel_error": "rel error", "overflow": "overflow", "error": "error"},
    ),
}  # fmt: skip
"""By phase: title, the value without which there is nothing to draw, the figure, and headings by column."""


def _show(results: pd.DataFrame, run_dir: Path) -> None:
    sections = []
    for phase, (title, value, draw, headings) in SECTIONS.items():
        rows = results[results["phase"] == phase].dropna(axis=1, how="all")
        if rows.empty:
            continue
        sections.append(kernel_figures.section(title, rows, headings))
        if value in rows:
            figure, data = draw(rows.dropna(subset=value) if phase == "resources" else rows)
            name = draw.__name__
            sections[-1].figures.append(save_picture(run_dir / "figures", name, figure, data, CAPTIONS[name]))
    kernel_figures.show(CONSOLE, run_dir, "Kernel block size", [ABOUT], sections)
