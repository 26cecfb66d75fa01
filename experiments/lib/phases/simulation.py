"""Simulation phase: request streams through the real scheduler and strategies, with a cost model for the model."""

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.lib.static_ratio import with_best_ratio
from experiments.lib.strategy_choices import CacheMemory, StrategyChoice, cache_columns
from experiments.lib.streams import comparable_streams, offered
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.sim.cost_model import CostModel
from hybridcache.sim.simulator import simulate
from hybridcache.workloads.base import Workload


class SimulationPhase:
    """Every strategy on the same streams.

    Args:
        choices: the strategies. ``ratio: best`` is searched on the first stream.
        memory: what each of them gets.
        streams: ``(seed, stream)`` of each repetition.
        scheduler: policies.
        cost_model: of the model.

    Raises:
        UserError: a strategy that the budget cannot hold.
    """

    def __init__(
        self, choices: Sequence[StrategyChoice], memory: CacheMemory, streams: Sequence[tuple[int, Workload]],
        scheduler: SchedulerConfig, cost_model: CostModel,
    ) -> None:  # fmt: skip
        self.memory, self.scheduler, self.cost_model = memory, scheduler, cost_model
        self.choices = with_best_ratio(choices, memory, [streams[0][1]], scheduler, cost_model)
        limits = [choice.build(memory).request_limit() for choice in self.choices]
        self.runs = [
            (repetition, seed, stream)
            for repetition, (seed, drawn) in enumerate(streams)
            for stream in comparable_streams(drawn, limits)
        ]

    def __len__(self) -> int:
        return len(self.choices) * len(self.runs)

    def rows(self, events: EventSink) -> Iterator[dict[str, Any]]:
        """One row per strategy, stream and repetition."""
        for choice in self.choices:
            for repetition, seed, stream in self.runs:
                strategy = choice.build(self.memory)
                recorder = Recorder(choice.labels("simulation", stream.name, repetition), events)
                result = simulate(stream, strategy, self.scheduler, self.cost_model, recorder)
                yield {
                    **recorder.finish(result.sequences, strategy, result.refused_requests),
                    **cache_columns(self.memory.spec), **choice.columns(), **offered(stream, len(result.sequences)),
                    "seed": seed, "device": f"cost model: {self.cost_model.label}", "backend": None,
                }  # fmt: skip
