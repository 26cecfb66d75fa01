"""Experiment ``checkpoint_policies``: a league of policies of prefix reuse, and the papers' claims put to the test.

One axis is varied at a time from the default policy: placement, retention, eviction, budget and workload; then the two best
placements and the two best eviction orders are combined, with the best retention. A serial replay: every policy meets the same
accesses, and differences to the default are paired.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.lib import settings
from experiments.lib.harness import CONSOLE, collect
from experiments.lib.phases.reuse_simulation import MOST_PROCESSES, Case, refusals, rows_of
from experiments.lib.policy_sets import BOUND, PolicySet
from experiments.lib.printed_tables import print_league
from experiments.lib.settings import container, resolve_model, spec_of
from experiments.lib.strategy_choices import AUTO, CacheMemory, StrategyChoice, choose_strategies
from hybridcache.errors import bad, number, whole
from hybridcache.observe.metrics import EventSink
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.policy import PrefixPolicy

MODEL = "qwen3_next_80b_a3b"
DEFAULT = PrefixPolicy()
TURNS = ("prompt_end", "generation_end")
AXES: dict[str, dict[str, PrefixPolicy]] = {
    "placement": {
        "generation_end": replace(DEFAULT, placement=("generation_end",)),
        "turns": replace(DEFAULT, placement=TURNS),
        "branch_points": replace(DEFAULT, placement=("generation_end", "branch_points")),
        "every_2048": replace(DEFAULT, every=2048),
        "log_spaced": replace(DEFAULT, placement=("generation_end", "branch_points", "log_spaced")),
        "uniform": replace(DEFAULT, placement=("generation_end", "branch_points", "uniform")),
        "optimal": replace(DEFAULT, placement=("generation_end", "branch_points", "optimal")),
    },
    "retention": {
        "all": replace(DEFAULT, retention="all"),
        "last_1": replace(DEFAULT, retention="last_k", last_k=1),
        "last_2": replace(DEFAULT, retention="last_k", last_k=2),
        "last_3": replace(DEFAULT, retention="last_k", last_k=3),
        "semantic": replace(DEFAULT, retention="semantic"),
        "share_0.5": replace(DEFAULT, retention="budget_share"),
    },
    "eviction": {name: replace(DEFAULT, eviction=name) for name in ORDERS},
    "claims": {
        "uniform_only": replace(DEFAULT, placement=("uniform",), retention="all"),
        "optimal_only": replace(DEFAULT, placement=("optimal",), retention="all"),
    },
}
"""Policies by axis. Those that are the default are not run again."""
CLAIMS = (
    ("Marconi (2411.19379): FLOP-aware eviction finds more tokens than LRU", "eviction=flop_aware", "eviction=lru", 0.0),
    ("SGLang 0.5.18: refreshing the consumed checkpoint alone finds more", "eviction=lru", "eviction=lru_path", 0.0),
    ("Sparse Prefix Caching (2605.05219): optimal placement beats as many at even distances", "claims=optimal_only",
     "claims=uniform_only", 0.0),
    ("vLLM 0.31: ends of turns alone keep most hits (0.9 of those of all)", "retention=semantic", "retention=all", 0.1),
)  # fmt: skip
"""Claim, the set that should find more, the other, and which share of the other's hits it may lose."""
NOT_TESTABLE = (
    "SGLang 0.5.18: segment-length-aware eviction lowers TTFT by 29.5 % (a replay has no latencies)",
    "SGLang 0.5.18: an int8 checkpoint pool raises reuse from 0.02 to 0.94 (states have one precision here)",
)


@dataclass
class Traces:
    agents: str | None
    mooncake: str | None


@dataclass
class League:
    streams: Any
    traces: Traces
    samples: int
    budget_factors: list[float]
    bootstrap: int
    processes: int | str


@dataclass
class Config(settings.Common):
    """What the experiment reads."""

    model: settings.Model
    device: settings.Device  # type: ignore[valid-type]
    kv_dtype: str
    state_dtype: str
    tp_size: int
    seed: int
    strategies: list[str]
    strategy_options: dict[str, Any]
    league: League


FAST = {"samples": 2, "budget_factors": [0.5], "bootstrap": 200, "processes": 1}
FAST_STREAM = {"live_sessions": 6, "num_sessions": 10, "turns": 3.0}


def resolve(cfg: DictConfig) -> DictConfig:
    """The settings with every ``auto`` replaced.

    Raises:
        UserError: a value that makes no sense.
    """
    league = cfg.league
    if league.streams == "auto":
        league.streams = AUTO["league"]
    for name, options in league.streams.items() if isinstance(league.streams, DictConfig) else [("", None)]:
        if not isinstance(options, DictConfig) or "budget_gb" not in options:
            raise bad(
                "league.streams", container(cfg)["league"]["streams"], "give {name: {budget_gb: N, ...}}, or auto"
            )
        number(f"league.streams.{name!s}.budget_gb", options.budget_gb, above=True)
    if cfg.fast:
        cfg.league = OmegaConf.merge(league, FAST)
        league = cfg.league
        for options in league.streams.values():
            options.update(FAST_STREAM, budget_gb=options.budget_gb / 12)
        league.traces = {"agents": None, "mooncake": None}
    if league.processes == "auto":
        league.processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    for key in ("samples", "bootstrap", "processes"):
        whole(f"league.{key}", league[key])
    for factor in league.budget_factors:
        number("league.budget_factors", factor, above=True)
    resolve_model(cfg, MODEL)
    return cfg


def run(cfg: DictConfig, run_dir: Path) -> pd.DataFrame:
    """Run the league; write ``results.parquet`` (a row a policy, stream and sample), ``league.csv`` (means and bands),
    ``claims.csv``, figures and the report.

    Raises:
        UserError: bad input, before anything long starts.
    """
    choice = choose_strategies(cfg)[0]
    streams = list(_streams(cfg))
    first = list(_first_sets(choice, [float(factor) for factor in cfg.league.budget_factors]))
    for text, _, gb in streams:
        refusals([Case(one, 0, _memory(cfg, gb * factor), 0, "replay") for _, one, factor in first if text])
    total = (len(first) + 4) * len(streams) * cfg.league.samples
    results = collect(cfg, run_dir, [("league", total, lambda events: _rows(cfg, choice, first, streams, events))])
    table, claims = (
        league_table(results, cfg.league.bootstrap, cfg.seed),
        claims_table(results, cfg.league.bootstrap, cfg.seed),
    )
    table.to_csv(run_dir / "league.csv", index=False)
    claims.to_csv(run_dir / "claims.csv", index=False)
    print_league(CONSOLE, table, claims)
    return results


Set = tuple[str, PolicySet, float]
"""Axis, policy set, and what its budget is multiplied by."""


def _first_sets(choice: StrategyChoice, factors: list[float]) -> Iterator[Set]:
    """The default and everything that differs from it in one thing."""
    yield "default", PolicySet(choice, "default", DEFAULT), 1.0
    for axis, policies in AXES.items():
        for name, policy in policies.items():
            if policy != DEFAULT:
                yield axis, PolicySet(choice, f"{axis}={name}", policy), 1.0
    for factor in factors:
        for name in ("default", "eviction=lru"):
            policy = DEFAULT if name == "default" else AXES["eviction"]["lru"]
            yield "budget", PolicySet(choice, f"{name}, budget x{factor:g}", policy), factor


def _streams(cfg: DictConfig) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Name, ``workload`` section and budget of each stream."""
    for name, options in container(cfg.league)["streams"].items():
        budget = options.pop("budget_gb")
        yield name, {"name": "random_sessions", "label": name, "seed": cfg.seed, **options}, budget
    traces = cfg.league.traces
    if traces.agents is not None:
        options = {"path": traces.agents, "live_sessions": 32, "num_sessions": 60, "seed": cfg.seed}
        yield "agents", {"name": "agent_sessions", **options}, 30.0
    if traces.mooncake is not None:
        yield (
            "mooncake",
            {"name": "mooncake", "path": traces.mooncake, "max_requests": 1500, "with_prompt_ids": True},
            40.0,
        )


def _memory(cfg: DictConfig, gb: float) -> CacheMemory:
    return CacheMemory(spec_of(cfg), int(gb * 1e9))


def _rows(
    cfg: DictConfig, choice: StrategyChoice, first: list[Set], streams: list[tuple[str, dict[str, Any], float]],
    events: EventSink,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    found: list[dict[str, Any]] = []
    for row in _play(cfg, first, streams, events):
        found.append(row)
        yield row
    yield from _play(cfg, [("combined", one, 1.0) for one in combined(choice, pd.DataFrame(found))], streams, events)


def _play(
    cfg: DictConfig, sets: list[Set], streams: list[tuple[str, dict[str, Any], float]], events: EventSink
) -> Iterator[dict[str, Any]]:
    """Every set on every sample of every stream."""
    for name, workload, gb in streams:
        for part, repetitions, sample in _samples(cfg, workload):
            cases = []
            for at in range(repetitions):
                labels = (("workload", name), ("repetition", at + sample))
                cases += [
                    Case(one, at, _memory(cfg, gb * factor), 0, "replay", (("axis", axis), *labels))
                    for axis, one, factor in sets
                ]
            yield from rows_of(part, cases, repetitions, cfg.league.processes, events)


def _samples(cfg: DictConfig, workload: Mapping[str, Any]) -> Iterator[tuple[DictConfig, int, int]]:
    """The configuration of a stream's samples: seeds, or windows of a trace without one."""
    samples, part = cfg.league.samples, OmegaConf.masked_copy(cfg, ["model", "device", "seed"])
    if workload["name"] != "mooncake":
        yield OmegaConf.merge(part, {"workload": dict(workload)}), samples, 0  # type: ignore[misc]
        return
    for sample in range(samples):
        moved = {**workload, "start_s": 3000.0 * sample / samples}
        yield OmegaConf.merge(part, {"workload": moved}), 1, sample  # type: ignore[misc]


def combined(choice: StrategyChoice, rows: pd.DataFrame) -> list[PolicySet]:
    """The two best placements with the two best eviction orders (the default's among them), under the best retention."""
    gains = paired(rows).groupby("policy")["difference"].mean()

    def best(axis: str, count: int) -> list[tuple[str, PrefixPolicy]]:
        values = {name: gains.get(f"{axis}={name}", 0.0) for name in AXES[axis] if name != BOUND}
        values.setdefault("default", 0.0)
        names = sorted(values, key=lambda name: -values[name])[:count]
        return [(name, AXES[axis].get(name, DEFAULT)) for name in names]

    (kept, retention), *_ = best("retention", 1)
    found = []
    for place, placement in best("placement", 2):
        for order, eviction in best("eviction", 2):
            policy = replace(
                placement, retention=retention.retention, last_k=retention.last_k, share=retention.share,
                eviction=eviction.eviction,
            )  # fmt: skip
            found.append(PolicySet(choice, f"combined={place}+{kept}+{order}", policy))
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def paired(rows: pd.DataFrame, base: str = "default") -> pd.DataFrame:
    """Every row with ``difference``, its hit rate less that of ``base`` on the same sample."""
    keys = ["workload", "repetition"]
    against = rows[rows["policy"] == base].set_index(keys)["hit_rate"]
    return rows.assign(difference=[row.hit_rate - against[row.workload, row.repetition] for row in rows.itertuples()])


def band(values: Any, resamples: int, seed: int) -> tuple[float, float]:
    """95 % band of a mean: the bootstrap's percentiles."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def league_table(results: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Means and bands of the hit rate and of its paired difference to the default, by stream and policy."""
    lines = []
    for (workload, axis, policy), rows in paired(results).groupby(["workload", "axis", "policy"], sort=False):
        low, high = band(rows["hit_rate"], resamples, seed)
        less, more = band(rows["difference"], resamples, seed)
        lines.append({
            "workload": workload, "axis": axis, "policy": policy, "samples": len(rows), "hit_rate": rows["hit_rate"].mean(),
            "low": low, "high": high, "difference": rows["difference"].mean(), "difference_low": less,
            "difference_high": more, "evicted": rows["evicted"].mean(),
        })  # fmt: skip
    return pd.DataFrame(lines)


def claims_table(results: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Each paper's claim on every stream: reproduced or refuted where the band of the difference says so, else undecided."""
    lines: list[dict[str, Any]] = []
    for claim, better, worse, may_lose in CLAIMS:
        names = [DEFAULT_NAMES.get(name, name) for name in (better, worse)]
        for workload, rows in results.groupby("workload", sort=False):
            first, second = (rows[rows["policy"] == name].set_index("repetition")["hit_rate"] for name in names)
            differences = first - (1 - may_lose) * second
            low, high = band(differences, resamples, seed)
            verdict = "reproduced" if low > 0 else "refuted" if high < 0 else "undecided"
            lines.append({
                "claim": claim, "workload": workload, "better": first.mean(), "worse": second.mean(),
                "difference": differences.mean(), "low": low, "high": high, "verdict": verdict,
            })  # fmt: skip
    lines += [{"claim": claim, "workload": "", "verdict": "not testable here"} for claim in NOT_TESTABLE]
    return pd.DataFrame(lines)


DEFAULT_NAMES = {
    f"{axis}={name}": "default"
    for axis, policies in AXES.items()
    for name, policy in policies.items()
    if policy == DEFAULT
}
"""Sets that are the default under another name."""
