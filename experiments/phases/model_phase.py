"""What every phase that runs a model shares: settings by kind of device, the model, engines, and what a row says of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from omegaconf import DictConfig

from experiments.strategies import StrategyChoice
from hybridcache.engine.engine import Engine
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.sequence import Sequence
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend, make_backend
from hybridcache.llm import load_for_inference
from hybridcache.observe.environment import device_name
from hybridcache.observe.metrics import Recorder
from hybridcache.spec import CacheSpec
from hybridcache.spec.dtypes import dtype_name


@dataclass(frozen=True)
class ModelSettings:
    """A section of the configuration with every ``auto`` resolved. Subclasses add fields and say what ``auto`` means."""

    device: str
    backend: str
    attention_backend: str
    model: str
    dtype: str
    state_dtype: str
    repetitions: int
    max_tokens_per_step: int
    cpu_threads: int

    AUTO: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What ``auto`` means, by kind of device."""
    COUNTS: ClassVar[tuple[str, ...]] = ("repetitions", "max_tokens_per_step", "cpu_threads")
    """Fields that are positive whole numbers."""

    @classmethod
    def resolve(cls, cfg: DictConfig, section: str) -> Self:
        """The section of that name.

        Raises:
            UserError: a value that makes no sense, CUDA where there is none, or a backend that is not installed.
        """
        device = cfg.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in cls.AUTO:
            raise bad(f"{section}.device", device, "choose auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise bad(f"{section}.device", device, "no CUDA device is here; choose auto or cpu")
        auto = cls.AUTO[device]
        values: dict[str, Any] = {
            str(key): auto.get(str(key)) if value == "auto" else value for key, value in cfg.items()
        }
        values |= {"device": device, "backend": cfg.backend, "attention_backend": cfg.attention_backend}
        values["dtype"] = dtype_name(values["dtype"], f"{section}.dtype")
        values["state_dtype"] = dtype_name(values["state_dtype"], f"{section}.state_dtype")
        for key in cls.COUNTS:
            if not isinstance(values[key], int) or values[key] < 1:
                raise bad(f"{section}.{key}", values[key], "give a positive whole number, or auto")
        settings = cls(**values)
        settings.make_backend()  # what is not installed is said before the model is loaded
        return settings

    def make_backend(self) -> Backend:
        """Raises UserError for a backend that is unknown or not installed."""
        return make_backend(self.backend, self.device, self.attention_backend)


class ModelPhase:
    """One model on one device."""

    def __init__(self, settings: ModelSettings, seed: int) -> None:
        self.on_cuda = settings.device == "cuda"
        self._settings = settings
        if not self.on_cuda:
            torch.set_num_threads(settings.cpu_threads)
        self.model, self.tokenizer = load_for_inference(
            settings.model, dtype=settings.dtype, device=settings.device, seed=seed
        )
        self.spec = CacheSpec.from_config(self.model.config, kv_dtype=settings.dtype, state_dtype=settings.state_dtype)

    def engine(
        self,
        choice: StrategyChoice,
        budget_bytes: int,
        scheduler: SchedulerConfig,
        recorder: Recorder | None = None,
    ) -> Engine:
        """A new engine over the strategy's memory."""
        strategy = choice.build(self.spec, budget_bytes, physical=True)
        return Engine(self.model, strategy, scheduler, self._settings.make_backend(), recorder=recorder)

    def provenance(self, launches: Mapping[str, int], backend: str) -> dict[str, Any]:
        """Which code ran, on what, in which precision."""
        return {
            "model": self._settings.model,
            "device": device_name() if self.on_cuda else "cpu",
            "backend": backend,
            "launches": json.dumps(dict(sorted(launches.items()))),
            "dtype": self._settings.dtype,
            "state_dtype": self._settings.state_dtype,
        }


def require_finished(label: str, engine: Engine, sequences: Iterable[Sequence]) -> None:
    """Raises RuntimeError where a request ended otherwise than by its length."""
    failed = {seq.seq_id: engine.error(seq.seq_id) for seq in sequences if seq.finish_reason != "length"}
    if failed:
        raise RuntimeError(f"{label}: {len(failed)} requests did not finish, the first: {failed.popitem()}")
