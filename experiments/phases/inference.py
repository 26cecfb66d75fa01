"""Inference phase: the model runs the stream, cut to size, on every physical strategy under one tight budget."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.phases.model_phase import ModelPhase, ModelSettings, require_finished
from experiments.strategies import StrategyChoice
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.spec import CacheSpec
from hybridcache.workloads.base import Workload


@dataclass(frozen=True)
class InferenceSettings(ModelSettings):
    """``cfg.inference``."""

    budget_bytes: int | None
    budget_requests: float
    num_requests: int
    max_prompt: int
    max_output: int

    AUTO: ClassVar = {
        "cpu": {
            "model": "tiny",
            "dtype": "float64",
            "state_dtype": "float64",
            "budget_requests": 4.0,
            "num_requests": 24,
            "max_prompt": 160,
            "max_output": 96,
            "max_tokens_per_step": 128,
        },
        "cuda": {
            "model": "qwen3_next_8l",
            "dtype": "bfloat16",
            "state_dtype": "float32",
            "budget_requests": 10.0,
            "num_requests": 64,
            "max_prompt": 2048,
            "max_output": 1024,
            "max_tokens_per_step": 8192,
        },
    }
    COUNTS: ClassVar = (*ModelSettings.COUNTS, "num_requests", "max_prompt", "max_output")

    def budget(self, spec: CacheSpec, workload: Workload) -> int:
        """The one budget of all strategies: given, or ``budget_requests`` times the stream's longest request."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        longest = max(request.prompt_tokens + request.output_tokens for request in workload.requests)
        return int(self.budget_requests * spec.request_bytes(longest))


class InferencePhase(ModelPhase):
    """One model on one device, run under each strategy in turn, with an engine of its own each time."""

    def __init__(self, settings: InferenceSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.settings = settings

    def rows(
        self,
        choices: Iterable[StrategyChoice],
        budget_bytes: int,
        workload: Workload,
        scheduler: SchedulerConfig,
        events: EventSink,
    ) -> Iterator[dict[str, Any]]:
        """One row per physical strategy and repetition."""
        for choice in choices:
            if self.on_cuda:
                # Untimed: kernels are compiled at their first call, a strategy's moves of memory late in the stream.
                self._run(choice, budget_bytes, workload, scheduler, None)
            for repetition in range(self.settings.repetitions):
                labels = {
                    "phase": "inference",
                    "strategy": choice.label,
                    "workload": workload.name,
                    "repetition": repetition,
                }
                recorder = Recorder(labels, events)
                engine = self._run(choice, budget_bytes, workload, scheduler, recorder)
                row = recorder.finish(engine.sequences, engine.strategy)
                yield {**row, **self.provenance(engine.backend.launches, engine.backend.name)}

    def _run(
        self,
        choice: StrategyChoice,
        budget_bytes: int,
        workload: Workload,
        scheduler: SchedulerConfig,
        recorder: Recorder | None,
    ) -> Engine:
        """The engine after the stream."""
        engine = self.engine(choice, budget_bytes, scheduler, recorder)
        for request in workload.requests:
            assert request.prompt_ids is not None
            engine.add_request(
                list(request.prompt_ids), SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            )
        engine.run()
        engine.strategy.check_integrity()
        require_finished(choice.label, engine, engine.sequences)
        return engine
