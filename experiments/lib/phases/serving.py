"""Serving phase: each workload at full speed through one engine a strategy, and a profile of its steps."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from experiments.lib.phases.model_phase import ModelPhase, require_finished, resolve_section
from experiments.lib.settings import container
from experiments.lib.strategy_choices import AUTO, StrategyChoice
from experiments.lib.streams import offered
from hybridcache.engine.engine import Engine
from hybridcache.engine.garbage import settle_heap
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.sequence import Sequence as EngineSequence
from hybridcache.errors import UserError, bad
from hybridcache.observe.compilations import compilations
from hybridcache.observe.metrics import EventSink, Recorder
from hybridcache.observe.step_profile import profile_steps
from hybridcache.workloads import build_workload, open_loop
from hybridcache.workloads.base import Workload

_LOG = logging.getLogger(__name__)

PROFILED_STEPS = 16
PROFILED_OUTPUT = PROFILED_STEPS + 8
"""Tokens that a request of the profiled decode steps samples: some come before those steps, while prompts are run."""


def resolve_serving(cfg: DictConfig) -> None:
    """Replace every ``auto`` of ``cfg.serving``; see :func:`resolve_section`."""
    resolve_section(cfg, "serving", AUTO["serving"], ("cache_bytes", "profile_rows", "profile_context"))


def serving_streams(workloads: Any, vocabulary: int, seed: int) -> list[Workload]:
    """The workloads of ``serving.workloads`` with their token ids.

    Raises:
        UserError: a workload that is not ``[requests, prompt tokens, output tokens]``.
    """
    shape_text = "[requests, prompt tokens, output tokens]"
    if not isinstance(workloads, Mapping) or not workloads:
        raise bad("serving.workloads", workloads, f"give {{name: {shape_text}}}, or auto")
    found = []
    for name, shape in workloads.items():
        if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
            raise bad(f"serving.workloads.{name}", shape, f"give {shape_text}")
        options = dict(zip(("num_requests", "prompt_tokens", "output_tokens"), shape))
        options |= {"first_id": min(1000, vocabulary // 2), "end_id": min(150_000, vocabulary)}
        found.append(open_loop(build_workload("fixed_lengths", **options, label=name, seed=seed)))
    return found


class ServingPhase(ModelPhase):
    """One model on one device; every strategy in turn serves all workloads with one engine.

    Args:
        cfg: of the experiment, with its resolved ``serving`` section.
        choices: physical strategies.

    Raises:
        UserError: bad workloads, or a budget that a strategy cannot use or that holds no request of a workload.
    """

    def __init__(self, cfg: DictConfig, choices: Sequence[StrategyChoice]) -> None:
        super().__init__(cfg, "serving")
        self.cache = self.memory(self.settings.cache_bytes)
        self.workloads = serving_streams(container(self.settings)["workloads"], self.model.config.vocab_size, cfg.seed)
        self.choices = self.tuned(choices, self.cache, self.workloads)
        limits = {choice.label: choice.build(self.cache, physical=True).request_limit() for choice in self.choices}
        for stream in self.workloads:  # requests of a workload are alike: a strategy holds all of them or none
            for label, limit in limits.items():
                if not stream.within(limit):
                    longest = max(r.prompt_tokens + r.output_tokens - 1 for r in stream.requests)
                    raise self._too_short(
                        label, limit, f"workload {stream.name} has {longest:,}; leave one of them out"
                    )
        profiled, first = self.settings.profile_context + PROFILED_OUTPUT - 1, self.choices[0].label
        if profiled > limits[first]:
            asked = f"a profiled one has {profiled:,}; give a smaller serving.profile_context"
            raise self._too_short(first, limits[first], asked)
        self._allocated_before = torch.cuda.memory_allocated() if self.on_cuda else 0

    def _too_short(self, label: str, limit: int, asked: str) -> UserError:
        """The error of requests that are longer than ``limit``: names the key that sets it."""
        if limit == self.max_request_tokens:
            why = f"requests have at most {limit:,} tokens, {asked}, or more, up to the model's limit"
            return bad("engine.max_model_len", self.max_model_len, why)
        held = f"{label} holds requests of at most {limit:,} tokens in it, {asked}, or more memory"
        return bad("serving.cache_bytes", self.settings.cache_bytes, held)

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
        labels = choice.labels("inference", workload.name, repetition)
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
            **row, **memory, **self.columns(launches, engine.backend.name), **choice.columns(),
            **offered(workload, len(sequences)),
        }  # fmt: skip

    def _serve(self, label: str, engine: Engine, workload: Workload) -> list[EngineSequence]:
        """All requests at once; the finished sequences."""
        sequences: list[EngineSequence] = []
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
        self._submit(engine, [context] * rows, PROFILED_OUTPUT)
        while engine.scheduler.waiting or any(seq.num_output < 2 for seq in engine.scheduler.running):
            engine.step()
        decoding = f"decode: {len(engine.scheduler.running)} requests of {context} tokens"
        self._profile_steps(choice, engine, PROFILED_STEPS, decoding, events, trace_dir)
        prompt = min(self.settings.max_tokens_per_step, engine.strategy.request_limit() - 1)
        self._submit(engine, [prompt], 2)
        self._profile_steps(choice, engine, 1, f"prefill: {prompt:,} tokens of one prompt", events, trace_dir)

    def _profile_steps(
        self, choice: StrategyChoice, engine: Engine, count: int, name: str, events: EventSink, trace_dir: Path | None
    ) -> None:
        """Profile the next steps, write the events and let the requests run to their end."""
        trace = None if trace_dir is None else trace_dir / f"{name.split(':')[0]}-trace.json"
        found = profile_steps(engine.step, count, self.model.device, trace)
        engine.run()
        for seq in engine.sequences:
            engine.forget(seq.seq_id)
        for part in found.parts:
            values = {"part": part.name, "seconds": part.seconds, "launches": part.launches}
            events.write({"event": "step_profile", **choice.labels("inference", name, 0), **values})

    def _submit(self, engine: Engine, prompts: Iterable[int], output_tokens: int) -> None:
        generator = np.random.default_rng(0)
        for length in prompts:
            ids = generator.integers(0, self.model.config.vocab_size, length)
            engine.add_request(ids, SamplingParams(max_tokens=output_tokens, ignore_eos=True))
