"""Inference phase: the model runs the stream, cut to size, on every physical strategy under one tight budget."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.strategies import StrategyChoice
from hybridcache.dtypes import dtype_name
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.environment import device_name
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend, make_backend
from hybridcache.llm import load_for_inference
from hybridcache.metrics import EventSink, Recorder
from hybridcache.spec import CacheSpec
from hybridcache.workloads.base import Workload

AUTO: dict[str, dict[str, Any]] = {
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
"""What ``auto`` means on each kind of device."""


@dataclass(frozen=True)
class InferenceSettings:
    """``cfg.inference`` with every ``auto`` resolved."""

    device: str
    backend: str
    attention_backend: str
    model: str
    dtype: str
    state_dtype: str
    budget_bytes: int | None
    budget_requests: float
    repetitions: int
    num_requests: int
    max_prompt: int
    max_output: int
    max_tokens_per_step: int
    cpu_threads: int

    @classmethod
    def resolve(cls, cfg: DictConfig) -> "InferenceSettings":
        """Raises UserError for CUDA where there is none."""
        device = cfg.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in AUTO:
            raise bad("inference.device", device, "choose auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise bad("inference.device", device, "no CUDA device is here; choose auto or cpu")
        values: dict[str, Any] = {
            str(key): AUTO[device].get(str(key)) if value == "auto" else value for key, value in cfg.items()
        }
        values |= {"device": device, "backend": cfg.backend, "attention_backend": cfg.attention_backend}
        values["dtype"] = dtype_name(values["dtype"], "inference.dtype")
        values["state_dtype"] = dtype_name(values["state_dtype"], "inference.state_dtype")
        for key in ("repetitions", "num_requests", "max_prompt", "max_output", "max_tokens_per_step", "cpu_threads"):
            if not isinstance(values[key], int) or values[key] < 1:
                raise bad(f"inference.{key}", values[key], "give a positive whole number, or auto")
        settings = cls(**values)
        settings.make_backend()  # what is not installed is said before the model is loaded
        return settings

    def make_backend(self) -> Backend:
        """Raises UserError for a backend that is unknown or not installed."""
        return make_backend(self.backend, self.device, self.attention_backend)

    def budget(self, spec: CacheSpec, workload: Workload) -> int:
        """The one budget of all strategies: given, or ``budget_requests`` times the stream's longest request."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        longest = max(request.prompt_tokens + request.output_tokens for request in workload.requests)
        return int(self.budget_requests * spec.request_bytes(longest))


class InferencePhase:
    """One model on one device, run under each strategy in turn."""

    def __init__(self, settings: InferenceSettings, seed: int) -> None:
        self.settings = settings
        if settings.device == "cpu":
            torch.set_num_threads(settings.cpu_threads)
        self.model, self.tokenizer = load_for_inference(
            settings.model, dtype=settings.dtype, device=settings.device, seed=seed
        )
        self.spec = CacheSpec.from_config(self.model.config, kv_dtype=settings.dtype, state_dtype=settings.state_dtype)

    def rows(
        self,
        choices: Iterable[StrategyChoice],
        budget_bytes: int,
        workload: Workload,
        scheduler: SchedulerConfig,
        events: EventSink,
    ) -> Iterator[dict[str, Any]]:
        """One row per physical strategy and repetition."""
        warm_up = workload
        for choice in choices:
            if self.settings.device == "cuda":
                # Untimed: kernels are compiled and libraries choose theirs by shape, so the first strategy runs it all.
                self._run(choice, budget_bytes, warm_up, scheduler, None)
                warm_up = _first_quarter(workload)
            for repetition in range(self.settings.repetitions):
                labels = {
                    "phase": "inference",
                    "strategy": choice.label,
                    "workload": workload.name,
                    "repetition": repetition,
                }
                recorder = Recorder(labels, events)
                engine, duration_s = self._run(choice, budget_bytes, workload, scheduler, recorder)
                row = recorder.finish(engine.sequences, duration_s, engine.strategy)
                yield {**row, "model": self.settings.model, **self._provenance(engine)}

    def _run(
        self,
        choice: StrategyChoice,
        budget_bytes: int,
        workload: Workload,
        scheduler: SchedulerConfig,
        recorder: Recorder | None,
    ) -> tuple[Engine, float]:
        """The engine after the stream, and the seconds it took."""
        strategy = choice.build(self.spec, budget_bytes, physical=True)
        backend = self.settings.make_backend()
        engine = Engine(self.model, strategy, scheduler, backend, recorder=recorder)
        for request in workload.requests:
            assert request.prompt_ids is not None
            engine.add_request(
                list(request.prompt_ids), SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            )
        duration_s = engine.run()
        strategy.check_integrity()
        failed = {seq.seq_id: engine.error(seq.seq_id) for seq in engine.sequences if seq.finish_reason != "length"}
        if failed:
            raise RuntimeError(f"{choice.label}: {len(failed)} requests did not finish, the first: {failed.popitem()}")
        return engine, duration_s

    def _provenance(self, engine: Engine) -> dict[str, Any]:
        """Which code ran, on what, in which precision."""
        return {
            "device": device_name() if self.settings.device == "cuda" else "cpu",
            "backend": engine.backend.name,
            "launches": json.dumps(dict(sorted(engine.backend.launches.items()))),
            "dtype": self.settings.dtype,
            "state_dtype": self.settings.state_dtype,
        }


def _first_quarter(workload: Workload) -> Workload:
    """Enough for a strategy's own kernel variants, once another has warmed the rest."""
    return Workload(workload.name, workload.source, workload.requests[: -(-len(workload.requests) // 4)])
