"""Experiment ``kernels``: every cache operation against its reference, the torch backend, installed peers and the device's
ceilings.

On CUDA at the shapes of Qwen3-Next-80B-A3B. On a CPU it is functional only: tiny shapes on the torch backend, checked by the
naive references; its times claim nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from benchmarks import kernel_figures, peers
from benchmarks.case import OPERATIONS, Case, cpu_cases, cuda_cases, fast_cuda_cases, select
from benchmarks.kernel_figures import row_label
from benchmarks.measure import Bench, Row, compile_case, failed, isolated_ceilings
from benchmarks.processes import in_parallel, isolated
from benchmarks.work import Setup
from experiments.lib.harness import CONSOLE, ProgressBar, write_json, write_results
from experiments.lib.settings import Common
from experiments.lib.strategy_choices import stored_columns
from hybridcache.device import choose_device
from hybridcache.errors import bad
from hybridcache.observe.environment import device_name, environment
from hybridcache.observe.report.page import Section, save_picture

FUNCTIONAL = "functional, not a timing claim"
HEADINGS = {
    "label": "shape", "impl": "impl", "l2": "L2", "median_ms": "ms", "spread": "±", "bytes": "bytes", "gbps": "GB/s",
    "tflops": "TFLOP/s", "fraction": "of ceiling", "bound": "bound", "rel_error": "rel error", "error": "error",
}  # fmt: skip
"""Of the tables, by column."""
CASE = ("op", "shape", "dtype", "kernel_block", "manager_block", "layout")
"""What tells the rows of one case from those of others."""


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
    settings, device = cfg.kernels, choose_device(cfg.kernels.device)
    on_cuda = device.type == "cuda"
    cases = _cases(list(settings.operations), on_cuda, cfg.fast)
    ceilings = None
    if on_cuda:
        for line in in_parallel(compile_case, cases):
            CONSOLE.print(f"does not compile: {line}", markup=False)
        ceilings = isolated_ceilings(settings.limit_s)
    else:
        torch.set_num_threads(1)
    rows: list[Row] = []
    record: dict[str, Any] = {
        "environment": environment(), "device": device_name() if on_cuda else "cpu",
        "claim": "measured" if on_cuda else FUNCTIONAL, "ceilings": vars(ceilings) if ceilings else None,
        "peers": peers.states(), "rows": rows,
    }  # fmt: skip
    common = {"experiment": cfg.experiment_name, "phase": "kernels", "repetition": 0, "device": record["device"]}
    common |= {"model": "qwen3_next_80b_a3b" if on_cuda else "tiny", "seed": cfg.seed}
    bench = Bench(Setup.on(device, cfg.seed), ceilings)
    if on_cuda if settings.isolate == "auto" else settings.isolate:
        found = isolated(bench.rows, cases, failed, limit_s=settings.limit_s)
    else:
        found = (row for case in cases for row in bench.rows(case))
    with ProgressBar(32) as progress:
        task = progress.add_task("kernels", total=len(cases))
        for row in found:
            rows.append(row)
            write_json(run_dir / "kernels.json", record)
            results = write_results([{**common, **_names(row), **row} for row in rows], run_dir)
            if row["error"]:
                CONSOLE.print(f"{row['op']} {row['shape']} {row['impl']}: {row['error']}", style="red", markup=False)
            done = len({tuple(row[key] for key in CASE) for row in rows})
            progress.update(task, completed=done, description=f"{row['op']} {row['shape']}")
    _show(record, results, run_dir)
    errors = [f"{row['op']} {row['shape']} {row['impl']}: {row['error']}" for row in rows if row["error"]]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(rows)} measurements failed, the first: {errors[0]}")
    return results


def _cases(operations: list[str], on_cuda: bool, fast: bool) -> list[Case]:
    for name in operations:
        if name not in OPERATIONS:
            raise bad("kernels.operations", name, f"choose some of {', '.join(OPERATIONS)}, or none for all")
    cases = select((fast_cuda_cases() if fast else cuda_cases()) if on_cuda else cpu_cases(), operations)
    if not cases:
        raise bad("kernels.operations", operations, "have no form on a CPU; choose others or device cuda")
    return cases


def _names(row: Row) -> dict[str, Any]:
    """Of a row, what every experiment's results have: strategy, workload and what lies in the cache."""
    blocks = [f"kb={row['kernel_block']}", f"Tm={row['manager_block']}", row["layout"]] if row["kernel_block"] else []
    where = [row["op"], row["shape"], row["dtype"], *blocks, *([row["l2"]] if row["l2"] else [])]
    states, copies = row["op"].startswith("gdn_"), row["dtype"] == "uint8"
    stored = stored_columns(None if states or copies else row["dtype"], row["dtype"] if states else None)
    return {"strategy": row["impl"], "workload": " ".join(map(str, where)), **stored}


# -- tables, figures, page ---------------------------------------------------------------------------------------------

CAPTIONS = {
    "fraction": "The least time that a measured ceiling allows (device copy, bf16 matrix product, host link) over the median "
    "time. 100 % is the ceiling; a mark beyond it had its data in the L2 cache.",
    "error": "Norm of the difference from a float64 reference over the norm of the reference, on fresh random inputs.",
}


def _show(record: dict[str, Any], results: pd.DataFrame, run_dir: Path) -> None:
    overview = Section("Overview", [f"Peer {name}: {state}." for name, state in record["peers"].items()])
    drawings = {
        "fraction": ("fraction", kernel_figures.fraction_of_ceiling),
        "error": ("rel_error", kernel_figures.relative_errors),
    }
    for name, (column, draw) in drawings.items():
        if results[column].notna().any():
            figure, data = draw(results)
            picture = save_picture(run_dir / "figures", f"kernels_{name}", figure, data, CAPTIONS[name])
            overview.figures.append(picture)
    sections = [overview]
    wrong = results[results["error"].notna()]
    if len(wrong):
        lines = wrong["op"] + " " + wrong["shape"] + " " + wrong["impl"] + ": " + wrong["error"]
        sections.append(Section("Failures", lines.tolist()))
    for operation, rows in results.groupby("op", sort=False):
        labels = [row_label(row) for _, row in rows.iterrows()]
        sections.append(kernel_figures.section(str(operation), rows.assign(label=labels), HEADINGS))
    CONSOLE.print(f"kernels, {record['device']}: {record['claim']}; {'; '.join(overview.texts)}", markup=False)
    kernel_figures.show(CONSOLE, run_dir, "Kernels", _about(record), sections)


def _about(record: dict[str, Any]) -> list[str]:
    at = record["ceilings"]
    if at is None:
        return [f"Device cpu: {FUNCTIONAL}. Tiny shapes on the torch backend, checked by the naive references."]
    return [
        f"{record['device']}, shapes of Qwen3-Next-80B-A3B. Measured ceilings: copy {at['copy_bytes'] / 1e12:.2f} TB/s, bf16 "
        f"matrix product {at['matmul_flops'] / 1e12:.0f} TFLOP/s, host link {at['to_host_bytes'] / 1e9:.0f} out and "
        f"{at['from_host_bytes'] / 1e9:.0f} GB/s in.",
        "Times are medians of one launch among those of a CUDA graph, each on memory of its own (clock: graph), or of single "
        "calls by events. Cold: a launch's data was evicted from the L2 cache by the launches before it. Warm: it was not.",
    ]
