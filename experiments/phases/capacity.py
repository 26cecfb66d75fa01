"""Capacity phase: how many requests of one length fit a budget, and what one request is charged. Accounting only."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.strategies import StrategyChoice
from hybridcache.observe.metrics import EventSink
from hybridcache.sim.capacity import charge, residents, waste_curve
from hybridcache.spec import CacheSpec
from hybridcache.strategies import Usage

WASTE_UP_TO = 3200
"""Tokens up to which the waste of one request is recorded for every length: three of the longest blocks compared."""


def capacity_rows(
    choices: Iterable[StrategyChoice], spec: CacheSpec, budget_bytes: int, lengths: Iterable[int], events: EventSink
) -> Iterator[dict[str, Any]]:
    """One row per strategy and length; a ``capacity`` and a ``charge`` event for each, a ``waste_curve`` per strategy."""
    lengths = list(lengths)
    for choice in choices:
        corners, waste = waste_curve(choice.build(spec, budget_bytes), min(max(lengths), WASTE_UP_TO))
        events.write({"event": "waste_curve", "strategy": choice.label, "length": corners, "waste_bytes": waste})
        for length in lengths:

            def make(choice: StrategyChoice = choice) -> Any:
                return choice.build(spec, budget_bytes)

            count, usage = residents(make, length)
            if count == 0:  # one request alone does not fit: there is nothing to charge
                yield {**_row(choice.label, length, 0, usage), "held_bytes_per_request": math.nan}
                continue
            one = charge(make, length)
            events.write(
                {
                    "event": "capacity",
                    "strategy": choice.label,
                    "length": length,
                    "residents": count,
                    "useful_bytes": usage.useful,
                    "held_bytes": usage.held,
                    "budget_bytes": budget_bytes,
                }
            )
            events.write(
                {
                    "event": "charge",
                    "strategy": choice.label,
                    "length": length,
                    "held_bytes": one.held,
                    "useful_bytes": one.useful,
                }
            )
            yield {**_row(choice.label, length, count, usage), "held_bytes_per_request": float(one.held)}


def _row(label: str, length: int, count: int, usage: Usage) -> dict[str, Any]:
    return {
        "phase": "capacity",
        "strategy": label,
        "workload": f"length={length}",
        "repetition": 0,
        "device": "accounting",
        "backend": None,
        "budget_bytes": usage.budget,
        "residents_peak": count,
        "useful_bytes_mean": float(usage.useful),
        "held_bytes_mean": float(usage.held),
        "reserved_bytes_mean": float(usage.reserved),
        "free_bytes_mean": float(usage.free),
        "utilization_mean": usage.utilization,
    }
