"""Request streams of an experiment: one for each repetition, and those that strategies can be compared on."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from experiments.lib.settings import container
from hybridcache.errors import UserError, bad, whole
from hybridcache.workloads import Stream, Workload, build_workload, open_loop, takes_seed

COMMON = " (common requests)"
"""Ends the label of a stream that was cut to the requests that all strategies hold."""


def workload_target(cfg: DictConfig) -> str:
    """The name or dotted path of the function that makes ``cfg.workload``.

    Raises:
        UserError: the configuration has neither.
    """
    found = cfg.workload.get("_target_") or cfg.workload.get("name")
    if not found:
        raise UserError("workload: its file needs name (a shipped workload) or _target_ (the path of a function)")
    return str(found)


def make_streams(cfg: DictConfig, repetitions: int, field: str) -> list[tuple[int, Workload]]:
    """:func:`seeded_streams`, for an experiment that must know all requests beforehand.

    Raises:
        UserError: also where the workload is a closed loop.
    """
    return [(seed, open_loop(stream)) for seed, stream in seeded_streams(cfg, repetitions, field)]


def seeded_streams(cfg: DictConfig, repetitions: int, field: str) -> list[tuple[int, Stream]]:
    """``(seed, stream)`` of each repetition: repetition r has the workload's seed plus r, so that every strategy meets the
    same streams.

    Args:
        cfg: with ``workload``, and ``seed`` for a workload that has none.
        repetitions: how many.
        field: names ``repetitions`` in errors.

    Raises:
        UserError: the workload cannot be made, or its repetitions would all be the same stream.
    """
    target = workload_target(cfg)
    options = {key: value for key, value in container(cfg.workload).items() if key not in ("_target_", "name")}
    if not takes_seed(target):
        if repetitions > 1:
            raise bad(field, repetitions, f"workload {target} has no seed: every repetition would be the same; give 1")
        return [(cfg.get("seed", 0), _named(cfg, build_workload(target, **options)))]
    seed = whole("workload.seed", options.pop("seed", cfg.get("seed", 0)), 0)
    seeds = range(seed, seed + repetitions)
    return [(each, _named(cfg, build_workload(target, seed=each, **options))) for each in seeds]


def _named(cfg: DictConfig, workload: Stream) -> Stream:
    """A user's workload bears the name that its YAML file gives it."""
    name = cfg.workload.get("name") if cfg.workload.get("_target_") else None
    return replace(workload, name=str(name)) if name and isinstance(workload, Workload) else workload


def comparable_streams(workload: Workload, limits: Iterable[int]) -> list[Workload]:
    """The stream and, where strategies would refuse different requests of it, the stream of those that all of them hold.

    Args:
        workload: the stream.
        limits: tokens of the longest request that each strategy holds.
    """
    limits = list(limits)
    served = {len(workload.within(limit)) for limit in limits}
    common = workload.within(min(limits))
    if len(served) == 1 or not common:
        return [workload]
    source = f"{workload.source} (the {len(common):,} of {len(workload.requests):,} requests that every strategy holds)"
    return [workload, Workload(workload.name + COMMON, source, common)]


def offered(workload: Workload, served: int) -> dict[str, Any]:
    """The columns of a result row that say how much of the stream ran."""
    total = len(workload.requests)
    return {
        "requests_offered": total,
        "requests_served": served,
        "requests_refused": total - served,
        "workload_source": workload.source,
    }
