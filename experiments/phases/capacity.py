"""Capacity phase: how many requests of one length fit a budget, and what one request is charged. Accounting only."""

from collections.abc import Iterable, Iterator
from typing import Any

from experiments.strategies import StrategyChoice
from hybridcache.metrics import EventSink
from hybridcache.sim.capacity import charge, residents
from hybridcache.spec import CacheSpec


def capacity_rows(
    choices: Iterable[StrategyChoice], spec: CacheSpec, budget_bytes: int, lengths: Iterable[int], events: EventSink
) -> Iterator[dict[str, Any]]:
    """One row per strategy and length; a ``capacity`` and a ``charge`` event for each."""
    for choice in choices:
        for length in lengths:

            def make(choice: StrategyChoice = choice) -> Any:
                return choice.build(spec, budget_bytes)

            count, usage = residents(make, length)
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
            yield {
                "phase": "capacity",
                "strategy": choice.label,
                "workload": f"length={length}",
                "repetition": 0,
                "device": "accounting",
                "backend": None,
                "budget_bytes": budget_bytes,
                "requests": count,
                "residents_peak": count,
                "useful_bytes_mean": float(usage.useful),
                "held_bytes_mean": float(usage.held),
                "reserved_bytes_mean": float(usage.reserved),
                "free_bytes_mean": float(usage.free),
                "utilization_mean": usage.utilization,
                "held_bytes_per_request": float(one.held),
            }
