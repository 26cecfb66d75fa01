"""Serving phase: each workload at full speed through one engine a strategy, and a profile of its steps."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from omegaconf import DictConfig

from experiments.lib.phases.model_phase import ModelPhase, ModelSettings, require_finished
from experiments.lib.static_ratio import wants_ratio, with_best_ratio
from experiments.lib.strategy_choices import StrategyChoice
from experiments.lib.streams import offered
from hybridcache.engine.engine import Engine
from hybridcache.engine.garbage import settle_heap
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.sequence import Sequence as EngineSequence
from hybridcache.errors import bad
from hybridcache.observe.compilations import compilations
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.observe.step_profile import StepProfile, profile_steps
from hybridcache.sim.cost_model import CostModel, DeviceSpec
from hybridcache.workloads import build_workload
from hybridcache.workloads.base import Workload

_LOG = logging.getLogger(__name__)

PROFILED_STEPS = 16


@dataclass(frozen=True)
class ServingSettings(ModelSettings):
    """``cfg.serving``."""

    cache_bytes: int
    workloads: dict[str, Sequence[int]]
    profile_rows: int
    profile_context: int

    AUTO: ClassVar = {
        "cpu": {
            "model": "tiny",
            "dtype": "float32",
            "cache_bytes": 2 << 20,
            "max_tokens_per_step": 256,
            "profile_rows": 8,
            "profile_context": 64,
            "workloads": {
                "bs1": (1, 16, 32),
                "chat": (16, 128, 16),
                "short": (32, 8, 32),
                "long": (6, 384, 16),
                "mixed": (16, 256, 8),
            },
        },
        "cuda": {
            "model": "qwen3_next_8l",
            "dtype": "bfloat16",
            "cache_bytes": 2 << 30,
            "max_tokens_per_step": 8192,
            "profile_rows": 256,
            "profile_context": 128,
            "workloads": {
                "bs1": (1, 128, 256),
                "chat": (256, 1024, 128),
                "short": (512, 64, 256),
                "long": (64, 4096, 128),
                "mixed": (256, 2048, 64),
            },
        },
    }
    COUNTS: ClassVar = (*ModelSettings.COUNTS, "cache_bytes", "profile_rows", "profile_context")

    def streams(self, vocabulary: int, seed: int) -> list[Workload]:
        """The workloads with their token ids.

        Raises:
            UserError: a workload that is not ``[requests, prompt tokens, output tokens]``.
        """
        found = []
        if not isinstance(self.workloads, Mapping) or not self.workloads:
            raise bad(
                "serving.workloads", self.workloads, "give {name: [requests, prompt tokens, output tokens]}, or auto"
            )
        for name, shape in self.workloads.items():
            if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
                raise bad(f"serving.workloads.{name}", shape, "give [requests, prompt tokens, output tokens]")
            first = min(1000, vocabulary // 2)
            found.append(
                build_workload(
                    "fixed_lengths",
                    num_requests=shape[0],
                    prompt_tokens=shape[1],
                    output_tokens=shape[2],
                    first_id=first,
                    end_id=min(150_000, vocabulary),
                    label=name,
                    seed=seed,
                )
            )
        return found


class ServingPhase(ModelPhase):
    """One model on one device; every strategy in turn serves all workloads with one engine.

    Args:
        settings: of the phase.
        cfg: of the experiment.
        choices: physical strategies. ``ratio: best`` is searched in simulation, for all workloads together.
        scheduler: policies.

    Raises:
        UserError: bad workloads, or a budget that a strategy cannot use or that holds no request of a workload.
    """

    def __init__(
        self,
        settings: ServingSettings,
        cfg: DictConfig,
        choices: Sequence[StrategyChoice],
        scheduler: SchedulerConfig,
    ) -> None:
        super().__init__(settings, cfg, scheduler)
        self.settings = settings
        self.cache = self.memory(settings.cache_bytes)
        offers = settings.streams(self.model.config.vocab_size, cfg.seed)
        if wants_ratio(choices):
            cost_model = CostModel.from_config(self.model.config, self.spec, DeviceSpec())
            choices = with_best_ratio(choices, self.cache, offers, self.scheduler, cost_model)
        self.choices = choices
        limits = {choice.label: choice.build(self.cache, physical=True).request_limit() for choice in choices}
        for stream in offers:  # requests of a workload are alike: a strategy holds all of them or none
            for label, limit in limits.items():
                if not stream.within(limit):
                    longest = max(r.prompt_tokens + r.output_tokens - 1 for r in stream.requests)
                    raise bad(
                        "serving.cache_bytes",
                        settings.cache_bytes,
                        f"{label} holds requests of at most {limit:,} tokens in it, workload {stream.name} has {longest:,}; "
                        "give more, or leave one of them out",
                    )
        self.workloads = offers
        self._allocated_before = torch.cuda.memory_allocated() if self.on_cuda else 0

    def __len__(self) -> int:
        return len(self.choices) * len(self.workloads) * self.settings.repetitions

    def rows(self, events: EventSink, trace_dir: Path | None = None) -> Iterator[dict[str, Any]]:
        """One row per strategy, workload and repetition; then profiles of the first strategy's steps go into the events."""
        for number, choice in enumerate(self.choices):
            # Untimed. The first strategy meets every shape; later ones find kernels and libraries warm.
            engine = self._warm_engine(choice, self.workloads if number == 0 else self.workloads[:2])
            for workload in self.workloads:
                for repetition in range(self.settings.repetitions):
                    yield self._row(choice, engine, workload, repetition, events)
            engine.strategy.check_integrity()
            del engine
        # Behind everything that is timed: PyTorch's profiler leaves CUPTI attached, and launches stay slower in this process.
        engine = self._warm_engine(self.choices[0], self.workloads[:2])
        self._profile(self.choices[0], engine, events, trace_dir)

    def _warm_engine(self, choice: StrategyChoice, workloads: Sequence[Workload]) -> Engine:
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        settle_heap()
        engine = self.engine(choice, self.cache)
        for workload in workloads:
            self._serve(choice.label, engine, workload)
        return engine

    def _row(
        self, choice: StrategyChoice, engine: Engine, workload: Workload, repetition: int, events: EventSink
    ) -> dict[str, Any]:
        labels = {
            "phase": "inference",
            "strategy": choice.label,
            "workload": workload.name,
            "repetition": repetition,
        }
        recorder = engine.recorder = Recorder(labels, events, origin_s=engine.now())
        launched = engine.backend.launches.copy()
        moved, appended = engine.strategy.bytes_moved, engine.strategy.table_entries_appended
        with compilations() as compiled:
            sequences = self._serve(choice.label, engine, workload)
        engine.recorder = None
        if compiled:
            _LOG.warning("%s, %s: compiled while timed: %s", choice.label, workload.name, ", ".join(compiled))
        row = recorder.finish(sequences, engine.strategy)
        row["bytes_moved"] -= moved
        row["table_entries_appended"] -= appended
        launches = engine.backend.launches - launched
        memory = {}
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated()
            memory = {
                "weight_bytes": self._allocated_before,
                "peak_device_bytes": peak,
                "workspace_bytes": peak - self._allocated_before - engine.runner.pool.buffer.nbytes,
                "stated_workspace_bytes": engine.memory.workspace_bytes,
            }
        row["kernels_compiled"] = len(compiled)
        return {
            **row,
            **memory,
            **self.columns(self.cache, launches, engine.backend.name),
            **choice.columns(),
            **offered(workload, len(sequences)),
        }

    def _serve(self, label: str, engine: Engine, workload: Workload) -> list[EngineSequence]:
        """All requests at once; the finished sequences."""
        sequences = []
        for request in workload.requests:
            params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            assert request.prompt_ids is not None
            sequences.append(engine.add_request(request.prompt_ids, params))
        engine.run()
        require_finished(f"{label}, {workload.name}", engine, sequences)
        for seq in sequences:
            engine.forget(seq.seq_id)
        return sequences

    # -- profile ---------------------------------------------------------------------------------------------------

    def _profile(self, choice: StrategyChoice, engine: Engine, events: EventSink, trace_dir: Path | None) -> None:
        """A decode step of many rows, and a step that only prefills."""
        rows, context = self.settings.profile_rows, self.settings.profile_context
        budget = self.settings.max_tokens_per_step
        prompts = [context] * rows
        self._submit(engine, prompts, PROFILED_STEPS + 8)
        while engine.scheduler.waiting or any(seq.num_output < 2 for seq in engine.scheduler.running):
            engine.step()
        decoding = len(engine.scheduler.running)
        steps = [("decode", f"{decoding} requests of {context} tokens", PROFILED_STEPS)]
        found = [profile_steps(engine.step, PROFILED_STEPS, self.model.device, _trace(trace_dir, "decode"))]
        self._drain(engine)
        self._submit(engine, [budget], 2)
        found.append(profile_steps(engine.step, 1, self.model.device, _trace(trace_dir, "prefill")))
        steps.append(("prefill", f"{budget:,} tokens of one prompt", 1))
        self._drain(engine)
        for (kind, text, _), profiled in zip(steps, found):
            for event in _events(kind, text, choice.label, profiled):
                events.write(event)

    def _submit(self, engine: Engine, prompts: Iterable[int], output_tokens: int) -> None:
        generator = np.random.default_rng(0)
        for length in prompts:
            ids = generator.integers(0, self.model.config.vocab_size, length)
            engine.add_request(ids, SamplingParams(max_tokens=output_tokens, ignore_eos=True))

    def _drain(self, engine: Engine) -> None:
        engine.run()
        for seq in engine.sequences:
            engine.forget(seq.seq_id)


def _trace(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / f"{name}-trace.json"


def _events(kind: str, text: str, strategy: str, profiled: StepProfile) -> Iterator[dict[str, Any]]:
    for part in profiled.parts:
        yield {
            "event": "step_profile",
            "phase": "inference",
            "strategy": strategy,
            "workload": f"{kind}: {text}",
            "repetition": 0,
            "part": part.name,
            "seconds": part.seconds,
            "launches": part.launches,
        }
