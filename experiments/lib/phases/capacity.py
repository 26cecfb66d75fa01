"""Capacity phase: how many requests of one length fit a budget, and what one request is charged. Accounting only."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from experiments.lib.strategy_choices import CacheMemory, StrategyChoice, cache_columns
from hybridcache.observe.metrics import EventSink
from hybridcache.sim.capacity import charge, residents, waste_curve
from hybridcache.strategies import Strategy, Usage

WASTE_UP_TO = 3200
"""Tokens up to which the waste of one request is recorded for every length: three of the longest blocks compared."""


def capacity_rows(
    choices: Sequence[StrategyChoice], memory: CacheMemory, lengths: Iterable[int], seed: int, events: EventSink
) -> Iterator[dict[str, Any]]:
    """One row per strategy and length; a ``capacity`` and a ``charge`` event for each, a ``waste_curve`` per strategy."""
    lengths = list(lengths)
    for choice in choices:

        def make(choice: StrategyChoice = choice) -> Strategy:
            return choice.build(memory)

        empty = make()
        corners, waste = waste_curve(empty, min(max(lengths), WASTE_UP_TO, empty.request_limit()))
        events.write({"event": "waste_curve", "strategy": choice.label, "length": corners, "waste_bytes": waste})
        for length in lengths:
            count, usage = residents(make, length)
            row = {**_row(length, count, usage), **cache_columns(memory.spec), **choice.columns(), "seed": seed}
            if count == 0:  # one request alone does not fit: there is nothing to charge
                yield {**row, "held_bytes_per_request": math.nan}
                continue
            one = charge(make, length)
            common = {"strategy": choice.label, "length": length}
            events.write(
                {
                    "event": "capacity", **common, "residents": count, "useful_bytes": usage.useful,
                    "held_bytes": usage.held, "budget_bytes": memory.budget_bytes,
                }
            )  # fmt: skip
            events.write({"event": "charge", **common, "held_bytes": one.held, "useful_bytes": one.useful})
            yield {**row, "held_bytes_per_request": float(one.held)}


def _row(length: int, count: int, usage: Usage) -> dict[str, Any]:
    """A length of which not one fits is refused."""
    return {
        "phase": "capacity", "workload": f"length={length}", "repetition": 0, "device": "accounting", "backend": None,
        "budget_bytes": usage.budget, "requests_offered": max(count, 1), "requests_served": count,
        "requests_refused": int(count == 0), "residents_peak": count, "useful_bytes_mean": float(usage.useful),
        "held_bytes_mean": float(usage.held), "reserved_bytes_mean": float(usage.reserved),
        "free_bytes_mean": float(usage.free), "utilization_mean": usage.utilization,
    }  # fmt: skip
