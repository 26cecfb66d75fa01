"""Inference phase: the model runs the stream, cut to size, on every physical strategy under one tight budget."""

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from experiments.lib.phases.model_phase import ModelPhase, require_finished, resolve_section
from experiments.lib.strategy_choices import AUTO, StrategyChoice
from experiments.lib.streams import comparable_streams, offered
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.errors import bad
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.workloads import Workload, cut_to_size, with_text_prompts


def resolve_inference(cfg: DictConfig) -> None:
    """Replace every ``auto`` of ``cfg.inference``; see :func:`resolve_section`.

    Raises:
        UserError: a value that makes no sense.
    """
    resolve_section(cfg, "inference", AUTO["inference"], ("num_requests", "max_prompt", "max_output"))
    for name in ("budget_bytes", "budget_requests"):
        value = cfg.inference[name]
        if value is not None and (not isinstance(value, int | float) or not 0 < value < float("inf")):
            raise bad(f"inference.{name}", value, "give a positive number, or auto")


class InferencePhase(ModelPhase):
    """One model on one device, run under each strategy in turn, with an engine of its own each time.

    Args:
        cfg: of the experiment, with its resolved ``inference`` section.
        choices: the strategies; those without physical memory are left out.
        workload: the stream before it is cut to size.

    Raises:
        UserError: no strategy is physical, the model has no text, or the budget holds no request.
    """

    def __init__(self, cfg: DictConfig, choices: Sequence[StrategyChoice], workload: Workload) -> None:
        physical = [choice for choice in choices if choice.supports_physical]
        if not physical:
            raise bad("strategies", [choice.label for choice in choices], "none is physical; inference needs one")
        super().__init__(cfg, "inference")
        settings = self.settings
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
        self.cache = self.memory(self._budget(stream))
        self.choices = self.tuned(physical, self.cache, [stream])
        limits = [choice.build(self.cache, physical=True).request_limit() for choice in self.choices]
        self.streams = comparable_streams(stream, limits)

    def _budget(self, stream: Workload) -> int:
        """The one budget of all strategies: given, or ``budget_requests`` times the stream's longest request."""
        if self.settings.budget_bytes is not None:
            return int(self.settings.budget_bytes)
        longest = max(request.prompt_tokens + request.output_tokens for request in stream.requests)
        return int(self.settings.budget_requests * self.spec.request_bytes(longest))

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
                    recorder = Recorder(choice.labels("inference", stream.name, repetition), events)
                    engine = self._run(choice, stream, recorder)
                    yield {
                        **recorder.finish(engine.sequences, engine.strategy),
                        **self.columns(engine.backend.launches, engine.backend.name),
                        **choice.columns(),
                        **offered(stream, len(list(engine.sequences))),
                    }

    def _run(self, choice: StrategyChoice, workload: Workload, recorder: Recorder | None) -> Engine:
        """The engine after the requests that it holds."""
        engine = self.engine(choice, self.cache, recorder)
        for request in workload.within(engine.strategy.request_limit()):
            assert request.prompt_ids is not None
            params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            engine.add_request(request.prompt_ids, params)
        engine.run()
        engine.strategy.check_integrity()
        require_finished(choice.label, engine, engine.sequences)
        return engine
