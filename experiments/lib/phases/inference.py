"""Inference phase: the model runs the stream, cut to size, on every physical strategy under one tight budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import DictConfig

from experiments.lib.phases.model_phase import ModelPhase, ModelSettings, require_finished
from experiments.lib.static_ratio import wants_ratio, with_best_ratio
from experiments.lib.strategy_choices import StrategyChoice
from experiments.lib.streams import comparable_streams, offered
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import bad
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.sim.cost_model import CostModel, DeviceSpec
from hybridcache.spec import CacheSpec
from hybridcache.workloads import Workload, cut_to_size, with_text_prompts


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
            "budget_bytes": None,
            "budget_requests": 4.0,
            "num_requests": 24,
            "max_prompt": 160,
            "max_output": 96,
            "max_tokens_per_step": 128,
        },
        "cuda": {
            "model": "qwen3_next_8l",
            "dtype": "bfloat16",
            "budget_bytes": None,
            "budget_requests": 10.0,
            "num_requests": 64,
            "max_prompt": 2048,
            "max_output": 1024,
            "max_tokens_per_step": 8192,
        },
    }
    COUNTS: ClassVar = (*ModelSettings.COUNTS, "num_requests", "max_prompt", "max_output")

    def __post_init__(self) -> None:
        for name, value in (("budget_bytes", self.budget_bytes), ("budget_requests", self.budget_requests)):
            if value is not None and (not isinstance(value, int | float) or not 0 < value < float("inf")):
                raise bad(f"inference.{name}", value, "give a positive number, or auto")

    def budget(self, spec: CacheSpec, workload: Workload) -> int:
        """The one budget of all strategies: given, or ``budget_requests`` times the stream's longest request."""
        if self.budget_bytes is not None:
            return int(self.budget_bytes)
        longest = max(request.prompt_tokens + request.output_tokens for request in workload.requests)
        return int(self.budget_requests * spec.request_bytes(longest))


class InferencePhase(ModelPhase):
    """One model on one device, run under each strategy in turn, with an engine of its own each time.

    Args:
        settings: of the phase.
        cfg: of the experiment.
        choices: the strategies; those without physical memory are left out. ``ratio: best`` is searched in simulation.
        workload: the stream before it is cut to size.
        scheduler: policies.

    Raises:
        UserError: no strategy is physical, the model has no text, or the budget holds no request.
    """

    def __init__(
        self,
        settings: InferenceSettings,
        cfg: DictConfig,
        choices: Sequence[StrategyChoice],
        workload: Workload,
        scheduler: SchedulerConfig,
    ) -> None:
        physical = [choice for choice in choices if choice.supports_physical]
        if not physical:
            raise bad("strategies", [choice.label for choice in choices], "none is physical; inference needs one")
        super().__init__(settings, cfg, scheduler)
        self.settings = settings
        if self.tokenizer is None:
            raise bad("model", settings.model, "its vocabulary has no room for bytes and it has no tokenizer")
        stream = cut_to_size(
            workload,
            max_prompt=settings.max_prompt,
            max_output=settings.max_output,
            num_requests=settings.num_requests,
            keep_ratio=False,  # one factor would leave most outputs a single token
        )
        stream = with_text_prompts(stream, self.tokenizer, seed=cfg.seed)
        self.cache = self.memory(settings.budget(self.spec, stream))
        if wants_ratio(physical):
            cost_model = CostModel.from_config(self.model.config, self.spec, DeviceSpec())
            physical = with_best_ratio(physical, self.cache, [stream], self.scheduler, cost_model)
        limits = [choice.build(self.cache, physical=True).request_limit() for choice in physical]
        self.choices = physical
        self.streams = comparable_streams(stream, limits)

    def __len__(self) -> int:
        return len(self.choices) * len(self.streams) * self.settings.repetitions

    def rows(self, events: EventSink) -> Iterator[dict[str, Any]]:
        """One row per physical strategy, stream and repetition; repetitions measure one stream again."""
        for choice in self.choices:
            if self.on_cuda:
                # Untimed: kernels are compiled at their first call, a strategy's moves of memory late in the stream.
                self._run(choice, self.streams[0], None)
            for stream in self.streams:
                for repetition in range(self.settings.repetitions):
                    labels = {
                        "phase": "inference",
                        "strategy": choice.label,
                        "workload": stream.name,
                        "repetition": repetition,
                    }
                    recorder = Recorder(labels, events)
                    engine = self._run(choice, stream, recorder)
                    yield {
                        **recorder.finish(engine.sequences, engine.strategy),
                        **self.columns(self.cache, engine.backend.launches, engine.backend.name),
                        **choice.columns(),
                        **offered(stream, len(list(engine.sequences))),
                    }

    def _run(self, choice: StrategyChoice, workload: Workload, recorder: Recorder | None) -> Engine:
        """The engine after the requests that it holds."""
        engine = self.engine(choice, self.cache, recorder)
        for request in workload.within(engine.strategy.request_limit()):
            assert request.prompt_ids is not None
            engine.add_request(
                list(request.prompt_ids), SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            )
        engine.run()
        engine.strategy.check_integrity()
        require_finished(choice.label, engine, engine.sequences)
        return engine
