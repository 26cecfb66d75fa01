"""Experiment ``geometry``: which manager block a model should use.

Lists the planner's candidates for one model and draws what each costs in state padding and in expected waste.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import FuncFormatter
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments.lib import settings
from experiments.lib.harness import CONSOLE, write_results
from experiments.lib.settings import resolve_model, spec_of
from experiments.lib.strategy_choices import cache_columns
from hybridcache.errors import bad, whole
from hybridcache.memory.geometry import KERNEL_BLOCK_TOKENS, Geometry, plan
from hybridcache.observe.report import style
from hybridcache.observe.report.page import save_picture
from hybridcache.observe.report.units import byte_unit, bytes_text, plural
from hybridcache.spec import CacheSpec

MIB = 1 << 20
COLORS = dict(zip(KERNEL_BLOCK_TOKENS, ("#0072B2", "#009E73", "#E69F00", "#CC79A7"), strict=True))
MARKERS = dict(zip(KERNEL_BLOCK_TOKENS, "os^D", strict=True))
MODEL = "qwen3_next_80b_a3b"
"""The model where none was chosen."""


@dataclass
class Section:
    top: int
    lengths: list[int]


@dataclass
class Config(settings.Common):
    """What the experiment reads."""

    model: settings.Model
    kv_dtype: str
    state_dtype: str
    tp_size: int
    geometry: Section


def resolve(cfg: DictConfig) -> DictConfig:
    """The settings with every ``auto`` replaced."""
    resolve_model(cfg, MODEL)
    return cfg


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Write ``geometry.csv``, ``results.parquet`` (the same table) and ``figures/geometry_padding.{png,pdf,csv}``; print the
    best candidates.

    Reads ``cfg.model``, ``cfg.kv_dtype``, ``cfg.state_dtype``, ``cfg.tp_size``, ``cfg.geometry.top`` and
    ``cfg.geometry.lengths``.

    Returns:
        One row per candidate, least expected waste first.

    Raises:
        UserError: the model is not hybrid or unknown, or a key of ``cfg.geometry`` is impossible.
    """
    top, lengths = cfg.geometry.top, list(cfg.geometry.lengths)
    whole("geometry.top", top, fix="give the number of candidates to print, 1 or more")
    if not lengths or len(set(lengths)) < len(lengths) or not all(isinstance(n, int) and n >= 1 for n in lengths):
        raise bad("geometry.lengths", lengths, "give at least one length, each once, of 1 token or more")
    spec = spec_of(cfg)
    rows = [_row(cfg, spec, found, rank, lengths) for rank, found in enumerate(plan(spec), start=1)]
    run_dir.mkdir(parents=True, exist_ok=True)
    results = write_results(rows, run_dir)
    results.to_csv(run_dir / "geometry.csv", index=False)
    figure, shown = _draw(results)
    save_picture(run_dir / "figures", "geometry_padding", figure, shown, caption="")
    CONSOLE.print(_table(results.head(top), spec, lengths))
    return results


def _row(cfg: DictConfig, spec: CacheSpec, found: Geometry, rank: int, lengths: list[int]) -> dict[str, Any]:
    kb, m, n = found.kernel_block_tokens, found.kernel_blocks_per_manager_block, found.states_per_manager_block
    row = {
        "experiment": "geometry", "phase": "geometry", "strategy": f"kb{kb}-m{m}-n{n}",
        "workload": f"{spec.model_type}-tp{spec.tp_size}", "repetition": 0, "device": "accounting",
        "model": cfg.model.name, **cache_columns(spec), "rank": rank, "kernel_block_tokens": kb,
        "kernel_blocks_per_manager_block": m, "states_per_manager_block": n,
        "manager_block_bytes": found.manager_block_bytes, "manager_block_tokens": found.manager_block_tokens,
        "state_blocks_per_request": found.state_blocks_per_request,
        "state_padding_percent": 100 * found.state_padding, "expected_waste_bytes": found.expected_waste_bytes,
    }  # fmt: skip
    for length in lengths:
        row[f"blocks_at_{length}"] = found.request_blocks(length)
        row[f"held_bytes_at_{length}"] = found.request_blocks(length) * found.manager_block_bytes
    return row


def _table(rows: pd.DataFrame, spec: CacheSpec, lengths: list[int]) -> Table:
    first = rows.iloc[0]
    table = Table(
        title=(
            f"{first.model}, TP {first.tp_size}: {len(spec.state_layers)} states of {spec.state_bytes_per_layer:,} B "
            f"({first.state_dtype}), {spec.kv_bytes_per_token:,} B of KV per token ({first.kv_dtype})"
        ),
        caption="kb tokens per kernel block, m kernel blocks per manager block, n states in it",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for name in ("", "kb", "m", "n", "block, B", "tokens", "state\npad, %", "waste,\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for length in lengths:
        table.add_column(f"blocks\nat {length:,}", justify="right")
        table.add_column(f"MiB\nat {length:,}", justify="right")
    for _, row in rows.iterrows():
        counts = (
            row["rank"],
            row.kernel_block_tokens,
            row.kernel_blocks_per_manager_block,
            row.states_per_manager_block,
        )
        cells = [*map(str, counts), f"{row.manager_block_bytes:,}", f"{row.manager_block_tokens:,}"]
        cells += [f"{row.state_padding_percent:.2f}", f"{row.expected_waste_bytes / MIB:.2f}"]
        for length in lengths:
            cells += [f"{row[f'blocks_at_{length}']:,}", f"{row[f'held_bytes_at_{length}'] / MIB:.1f}"]
        table.add_row(*cells, style="bold" if row["rank"] == 1 else None)
    return table


# -- figure ------------------------------------------------------------------------------------------------------------


@style.styled()
def _draw(results: pd.DataFrame) -> style.Drawn:
    """Padding and expected waste against the tokens of a manager block.

    Of candidates with the same kernel and manager block only the best is shown: they differ in how many states they put
    into it.
    """
    columns = ["rank", "kernel_block_tokens", "kernel_blocks_per_manager_block", "states_per_manager_block"]
    columns += ["manager_block_tokens", "state_padding_percent", "expected_waste_bytes"]
    shown = results.drop_duplicates(["kernel_block_tokens", "manager_block_tokens"]).sort_values(
        "manager_block_tokens", kind="stable"
    )
    chosen = results.iloc[0]
    states = plural(chosen.states_per_manager_block, "state")
    ring = f"chosen: {chosen.kernel_blocks_per_manager_block} x {chosen.kernel_block_tokens} tokens, {states}"
    divisor, unit = byte_unit(chosen.expected_waste_bytes)
    panels = (
        ("state_padding_percent", 1.0, "Padding of a state block", "% of the exact states in it"),
        ("expected_waste_bytes", divisor, "Expected waste: padding and half a block of tail", unit),
    )
    figure = style.new_figure(4.6)
    for axes, (column, scale, title, label) in zip(figure.subplots(1, 2), panels):
        for kb, group in shown.groupby("kernel_block_tokens"):
            x, y, look = group["manager_block_tokens"], group[column] / scale, {"color": COLORS[kb], "clip_on": False}
            axes.plot(x, y, "-", lw=0.9, alpha=0.35, zorder=2, **look)
            size = 8.0 - 1.2 * KERNEL_BLOCK_TOKENS.index(kb)  # larger for smaller blocks: coinciding ones all show
            axes.plot(x, y, MARKERS[kb], ms=size, mec="white", mew=0.4, label=f"kernel block {kb}", **look)
        at = chosen.manager_block_tokens, chosen[column] / scale
        axes.plot(*at, "o", ms=15, mfc="none", mec="#C00000", mew=1.8, label=ring, zorder=4, clip_on=False)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("tokens of KV in a manager block")
        axes.set_ylabel(label)
        style.magnitude_axis(axes, (shown[column] / scale).to_numpy())
        blocks = shown["manager_block_tokens"]
        style.log_axis(axes, blocks.min(), blocks.max(), FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    style.set_title(
        figure,
        f"{chosen.model} (TP {chosen.tp_size}, {chosen.state_dtype} state, {chosen.kv_dtype} KV): manager blocks of "
        f"{chosen.manager_block_tokens:,} tokens waste least, {bytes_text(chosen.expected_waste_bytes)} a request",
    )
    return figure, shown[columns].sort_values("rank")
