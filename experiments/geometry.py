"""Experiment ``geometry``: which manager block a model should use.

Lists the planner's candidates for one model and draws what each costs in state padding and in expected waste.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments.lib import settings
from experiments.lib.harness import CONSOLE, write_results
from experiments.lib.settings import container, model_chosen
from hybridcache.errors import bad
from hybridcache.memory.geometry import KERNEL_BLOCK_TOKENS, Geometry, plan
from hybridcache.observe.report import style
from hybridcache.observe.report.units import byte_unit, bytes_text
from hybridcache.spec import CacheSpec
from models.configs import shipped_fields

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
    if not model_chosen(cfg):
        cfg.model = {"name": MODEL, "hf_config": shipped_fields(MODEL)}
    cfg.kv_dtype = "bfloat16" if cfg.kv_dtype == "auto" else cfg.kv_dtype
    cfg.state_dtype = "float32" if cfg.state_dtype == "auto" else cfg.state_dtype
    return cfg


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Write ``geometry.csv``, ``results.parquet`` (the same table) and ``figures/geometry_padding.{png,csv}``; print the
    best candidates.

    Reads ``cfg.model``, ``cfg.kv_dtype``, ``cfg.state_dtype``, ``cfg.tp_size``, ``cfg.geometry.top`` and
    ``cfg.geometry.lengths``.

    Returns:
        One row per candidate, least expected waste first.

    Raises:
        UserError: the model is not hybrid or unknown, or a key of ``cfg.geometry`` is impossible.
    """
    lengths = _lengths(cfg)
    top = cfg.geometry.top
    if not isinstance(top, int) or top < 1:
        raise bad("geometry.top", top, "give the number of candidates to print, 1 or more")
    fields = container(cfg.model.hf_config)
    spec = CacheSpec.from_config(fields, kv_dtype=cfg.kv_dtype, state_dtype=cfg.state_dtype, tp_size=cfg.tp_size)
    rows = [_row(cfg, spec, found, rank, lengths) for rank, found in enumerate(plan(spec), start=1)]
    run_dir.mkdir(parents=True, exist_ok=True)
    results = write_results(rows, run_dir)
    results.to_csv(run_dir / "geometry.csv", index=False)
    _draw(results, run_dir / "figures")
    CONSOLE.print(_table(results.head(top), spec, lengths))
    return results


def _lengths(cfg: DictConfig) -> list[int]:
    lengths = list(cfg.geometry.lengths)
    if not lengths or len(set(lengths)) < len(lengths):
        raise bad("geometry.lengths", lengths, "give at least one length, each once")
    for length in lengths:
        if not isinstance(length, int) or length < 1:
            raise bad("geometry.lengths", lengths, "give lengths of 1 token or more")
    return lengths


def _row(cfg: DictConfig, spec: CacheSpec, found: Geometry, rank: int, lengths: list[int]) -> dict[str, Any]:
    kb, m, n = found.kernel_block_tokens, found.kernel_blocks_per_manager_block, found.states_per_manager_block
    row = {
        "experiment": "geometry",
        "phase": "geometry",
        "strategy": f"kb{kb}-m{m}-n{n}",
        "workload": f"{spec.model_type}-tp{spec.tp_size}",
        "repetition": 0,
        "model": cfg.model.name,
        "kv_dtype": spec.attention.dtype if spec.attention else None,
        "state_dtype": spec.state.recurrent_dtype if spec.state else None,
        "tp_size": spec.tp_size,
        "rank": rank,
        "kernel_block_tokens": kb,
        "kernel_blocks_per_manager_block": m,
        "states_per_manager_block": n,
        "manager_block_bytes": found.manager_block_bytes,
        "manager_block_tokens": found.manager_block_tokens,
        "state_blocks_per_request": found.state_blocks_per_request,
        "state_padding_percent": 100 * found.state_padding,
        "expected_waste_bytes": found.expected_waste_bytes,
    }
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
        cells = [
            str(row["rank"]),
            str(row.kernel_block_tokens),
            str(row.kernel_blocks_per_manager_block),
            str(row.states_per_manager_block),
            f"{row.manager_block_bytes:,}",
            f"{row.manager_block_tokens:,}",
            f"{row.state_padding_percent:.2f}",
            f"{row.expected_waste_bytes / MIB:.2f}",
        ]
        for length in lengths:
            cells += [f"{row[f'blocks_at_{length}']:,}", f"{row[f'held_bytes_at_{length}'] / MIB:.1f}"]
        table.add_row(*cells, style="bold" if row["rank"] == 1 else None)
    return table


# -- figure ------------------------------------------------------------------------------------------------------------


def _draw(results: pd.DataFrame, folder: Path) -> None:
    """``geometry_padding.png``: padding and expected waste against the tokens of a manager block, and its data.

    Of candidates with the same kernel and manager block only the best is shown: they differ in how many states they put
    into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = results.drop_duplicates(["kernel_block_tokens", "manager_block_tokens"])
    columns = ["rank", "kernel_block_tokens", "kernel_blocks_per_manager_block", "states_per_manager_block"]
    columns += ["manager_block_tokens", "state_padding_percent", "expected_waste_bytes"]
    shown[columns].to_csv(folder / "geometry_padding.csv", index=False)
    with style.styled():
        figure = _figure(shown)
        figure.savefig(folder / "geometry_padding.png")


def _figure(shown: pd.DataFrame) -> Figure:
    chosen = shown.iloc[0]
    figure = style.new_figure(4.6)
    style.set_title(
        figure,
        f"{chosen.model} (TP {chosen.tp_size}, {chosen.state_dtype} state, {chosen.kv_dtype} KV): manager blocks of "
        f"{chosen.manager_block_tokens:,} tokens waste least, {bytes_text(chosen.expected_waste_bytes)} a request",
    )
    padding, waste = figure.subplots(1, 2)
    divisor, unit = byte_unit(chosen.expected_waste_bytes)
    panels = (
        (padding, shown["state_padding_percent"], "Padding of a state block", "% of the exact states in it"),
        (waste, shown["expected_waste_bytes"] / divisor, "Expected waste: padding and half a block of tail", unit),
    )
    low, high = shown["manager_block_tokens"].min(), shown["manager_block_tokens"].max()
    for axes, values, title, label in panels:
        for kb, group in shown.groupby("kernel_block_tokens"):
            _series(axes, int(kb), group["manager_block_tokens"], values[group.index])
        _ring(axes, chosen, values.iloc[0])
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("tokens of KV in a manager block")
        axes.set_ylabel(label)
        style.magnitude_axis(axes, values.to_numpy())
        style.log_axis(axes, low, high, FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles, labels = padding.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _series(axes: Axes, kb: int, tokens: pd.Series, values: pd.Series) -> None:
    """One kernel block's candidates. Smaller blocks have larger markers, so that coinciding ones all show."""
    order = tokens.sort_values().index
    axes.plot(tokens[order], values[order], "-", color=COLORS[kb], lw=0.9, alpha=0.35, zorder=2)
    size = 8.0 - 1.2 * KERNEL_BLOCK_TOKENS.index(kb)
    name = f"kernel block {kb}"
    look: dict[str, Any] = {
        "ms": size,
        "color": COLORS[kb],
        "mec": "white",
        "mew": 0.4,
        "label": name,
        "clip_on": False,
    }
    axes.plot(tokens[order], values[order], MARKERS[kb], **look)


def _ring(axes: Axes, chosen: pd.Series, y: float) -> None:
    """A ring around the chosen candidate."""
    name = f"chosen: {chosen.kernel_blocks_per_manager_block} x {chosen.kernel_block_tokens} tokens"
    name += f", {chosen.states_per_manager_block} state" + ("s" if chosen.states_per_manager_block > 1 else "")
    x = chosen.manager_block_tokens
    axes.plot([x], [y], "o", ms=15, mfc="none", mec="#C00000", mew=1.8, label=name, zorder=4, clip_on=False)
