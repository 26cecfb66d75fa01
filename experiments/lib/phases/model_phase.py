"""What every phase that runs a model shares: settings by kind of device, the model, engines, and what a row says of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch
from omegaconf import DictConfig

from experiments.lib.settings import container, model_chosen
from experiments.lib.strategy_choices import CacheMemory, StrategyChoice
from hybridcache.engine.engine import Engine
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.sequence import Sequence
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend, make_backend
from hybridcache.llm import load_for_inference, random_for_inference
from hybridcache.observe.environment import device_name
from hybridcache.observe.metrics import Recorder
from hybridcache.spec import CacheSpec
from hybridcache.spec.dtypes import dtype_name
from models.configs import shipped_fields


@dataclass(frozen=True)
class ModelSettings:
    """A section of the configuration with every ``auto`` resolved, and what the run's own keys mean for it (``model``,
    ``kv_dtype``, ``state_dtype``, ``max_tokens_per_step``). Subclasses add fields and say what ``auto`` means."""

    device: str
    backend: str
    attention_backend: str
    checkpoint: str | None
    dtype: str
    repetitions: int
    cpu_threads: int
    model: str
    kv_dtype: str
    state_dtype: str
    max_tokens_per_step: int

    AUTO: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What ``auto`` means, by kind of device."""
    COUNTS: ClassVar[tuple[str, ...]] = ("repetitions", "max_tokens_per_step", "cpu_threads")
    """Fields that are positive whole numbers."""

    @classmethod
    def resolve(cls, cfg: DictConfig, section: str) -> Self:
        """The section of that name, of an experiment that reads ``model``, ``kv_dtype``, ``state_dtype`` and ``engine``.

        Raises:
            UserError: a value that makes no sense, CUDA where there is none, or a backend that is not installed.
        """
        own = container(cfg[section])
        device = own["device"]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in cls.AUTO:
            raise bad(f"{section}.device", device, "choose auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise bad(f"{section}.device", device, "no CUDA device is here; choose auto or cpu")
        auto = cls.AUTO[device]
        if own["checkpoint"] is not None and model_chosen(cfg):
            raise bad(f"{section}.checkpoint", own["checkpoint"], f"stands beside model={cfg.model.name}; give one")
        shared = {
            "model": own["checkpoint"] or (cfg.model.name if model_chosen(cfg) else "auto"),
            "kv_dtype": cfg.kv_dtype,
            "state_dtype": cfg.state_dtype,
            "max_tokens_per_step": cfg.engine.max_tokens_per_step,
        }
        kept = ("backend", "attention_backend")  # auto is theirs to resolve
        values = {
            key: auto[key] if value == "auto" and key in auto and key not in kept else value
            for key, value in {**own, **shared, "device": device}.items()
        }
        values["dtype"] = dtype_name(values["dtype"], f"{section}.dtype")
        if values["kv_dtype"] == "auto":
            values["kv_dtype"] = values["dtype"]
        if values["state_dtype"] == "auto":
            values["state_dtype"] = "float64" if values["dtype"] == "float64" else "float32"
        for key in ("kv_dtype", "state_dtype"):
            values[key] = dtype_name(values[key], key)
        for key in cls.COUNTS:
            count = values[key]
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                name = "engine.max_tokens_per_step" if key == "max_tokens_per_step" else f"{section}.{key}"
                raise bad(name, count, "give a positive whole number" + (", or auto" if key in auto else ""))
        settings = cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})
        settings.make_backend()  # what is not installed is said before the model is loaded
        return settings

    def record(self) -> dict[str, Any]:
        """For ``config.yaml``."""
        return asdict(self)

    def make_backend(self) -> Backend:
        """Raises UserError for a backend that is unknown or not installed."""
        return make_backend(self.backend, self.device, self.attention_backend)


class ModelPhase:
    """One model on one device.

    Args:
        settings: of the phase.
        cfg: of the experiment; its ``model``, where it was chosen, is the one that runs.
        scheduler: policies, but for the token budget, which is the settings'.
    """

    def __init__(self, settings: ModelSettings, cfg: DictConfig, scheduler: SchedulerConfig) -> None:
        self.on_cuda = settings.device == "cuda"
        self._settings, self.seed = settings, cfg.seed
        self.scheduler = replace(scheduler, max_tokens_per_step=settings.max_tokens_per_step)
        if not self.on_cuda:
            torch.set_num_threads(settings.cpu_threads)
        of: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "seed": cfg.seed}
        if settings.checkpoint is not None:
            self.model, self.tokenizer = load_for_inference(settings.checkpoint, **of)
        else:
            chosen = model_chosen(cfg) and cfg.model.name == settings.model
            fields = container(cfg.model.hf_config) if chosen else shipped_fields(settings.model)
            self.model, self.tokenizer = random_for_inference(settings.model, fields, **of)
        self.spec = CacheSpec.from_config(
            self.model.config, kv_dtype=settings.kv_dtype, state_dtype=settings.state_dtype
        )

    def memory(self, budget_bytes: int) -> CacheMemory:
        """What every strategy gets."""
        longest = self.model.config.max_position_embeddings
        return CacheMemory(self.spec, budget_bytes, self.scheduler.max_running, longest)

    def engine(self, choice: StrategyChoice, memory: CacheMemory, recorder: Recorder | None = None) -> Engine:
        """A new engine over the strategy's memory."""
        strategy = choice.build(memory, physical=True)
        return Engine(self.model, strategy, self.scheduler, self._settings.make_backend(), recorder=recorder)

    def columns(self, memory: CacheMemory, launches: Mapping[str, int], backend: str) -> dict[str, Any]:
        """The columns of a result row that say which code ran, on what, in which precision."""
        return {
            **memory.columns(),
            "model": self._settings.model,
            "seed": self.seed,
            "device": device_name() if self.on_cuda else "cpu",
            "backend": backend,
            "launches": json.dumps(dict(sorted(launches.items()))),
            "dtype": self._settings.dtype,
        }


def require_finished(label: str, engine: Engine, sequences: Iterable[Sequence]) -> None:
    """Raises RuntimeError where a request ended otherwise than by its length."""
    failed = {seq.seq_id: engine.error(seq.seq_id) for seq in sequences if seq.finish_reason != "length"}
    if failed:
        raise RuntimeError(f"{label}: {len(failed)} requests did not finish, the first: {failed.popitem()}")
