"""Simulation phase: one request stream through the real scheduler and strategies, with a cost model for the model."""

from collections.abc import Iterable, Iterator
from typing import Any

from experiments.strategies import StrategyChoice
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.sim.cost_model import CostModel
from hybridcache.sim.simulator import simulate
from hybridcache.spec import CacheSpec
from hybridcache.workloads.base import Workload


def simulation_rows(
    choices: Iterable[StrategyChoice],
    spec: CacheSpec,
    budget_bytes: int,
    workload: Workload,
    scheduler: SchedulerConfig,
    cost_model: CostModel,
    repetitions: int,
    events: EventSink,
) -> Iterator[dict[str, Any]]:
    """One row per strategy and repetition. The simulator is deterministic: repetitions differ in nothing but their label
    unless the workload is drawn anew."""
    for choice in choices:
        for repetition in range(repetitions):
            labels = {
                "phase": "simulation",
                "strategy": choice.label,
                "workload": workload.name,
                "repetition": repetition,
            }
            strategy = choice.build(spec, budget_bytes)
            recorder = Recorder(labels, events)
            result = simulate(workload, strategy, scheduler, cost_model, recorder)
            row = recorder.finish(result.sequences, strategy, result.refused_requests)
            yield {**row, "device": f"cost model: {cost_model.label}", "backend": None}
