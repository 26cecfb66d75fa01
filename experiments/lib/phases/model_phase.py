"""What every phase that runs a model shares: settings by kind of device, the model, engines, and what a row says of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.lib.settings import container, max_request_tokens, model_chosen, scheduler_config
from experiments.lib.static_ratio import wants_ratio, with_best_ratio
from experiments.lib.strategy_choices import CacheMemory, StrategyChoice, cache_columns
from hybridcache.engine.engine import Engine
from hybridcache.engine.sequence import Sequence as EngineSequence
from hybridcache.errors import bad, whole
from hybridcache.kernels.backend import make_backend
from hybridcache.llm import load_for_inference
from hybridcache.observe.environment import device_name
from hybridcache.observe.metrics import Recorder
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.sim.cost_model import CostModel, DeviceSpec
from hybridcache.spec import CacheSpec
from hybridcache.spec.dtypes import dtype_name
from hybridcache.workloads import Workload
from models.configs import shipped_fields

COUNTS = ("repetitions", "max_tokens_per_step", "cpu_threads")
"""Keys of every such section that are positive whole numbers."""


def resolve_section(
    cfg: DictConfig, section: str, defaults: Mapping[str, Mapping[str, Any]], counts: Iterable[str]
) -> None:
    """Replace every ``auto`` in the section of that name, and add what the run's own keys mean for it (``model``,
    ``kv_dtype``, ``state_dtype``, ``max_tokens_per_step``).

    Args:
        cfg: of an experiment that reads those keys.
        defaults: what ``auto`` means, by kind of device.
        counts: keys that are positive whole numbers, besides :data:`COUNTS`.

    Raises:
        UserError: a value that makes no sense, CUDA where there is none, or a backend that is not installed.
    """
    own = container(cfg[section])
    device = own["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in defaults:
        raise bad(f"{section}.device", device, "choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise bad(f"{section}.device", device, "no CUDA device is here; choose auto or cpu")
    auto = defaults[device]
    if own["checkpoint"] is not None and model_chosen(cfg):
        raise bad(f"{section}.checkpoint", own["checkpoint"], f"stands beside model={cfg.model.name}; give one")
    shared = {
        "model": own["checkpoint"] or (cfg.model.name if model_chosen(cfg) else "auto"),
        "kv_dtype": cfg.kv_dtype,
        "state_dtype": cfg.state_dtype,
        "max_tokens_per_step": cfg.engine.max_tokens_per_step,
    }
    values = {**own, **shared, "device": device}
    values |= {key: auto[key] for key, value in values.items() if value == "auto" and key in auto}
    values["dtype"] = dtype_name(values["dtype"], f"{section}.dtype")
    if values["kv_dtype"] == "auto":
        values["kv_dtype"] = values["dtype"]
    if values["state_dtype"] == "auto":
        values["state_dtype"] = "float64" if values["dtype"] == "float64" else "float32"
    for key in ("kv_dtype", "state_dtype"):
        values[key] = dtype_name(values[key], key)
    for key in (*COUNTS, *counts):
        name = "engine.max_tokens_per_step" if key == "max_tokens_per_step" else f"{section}.{key}"
        whole(name, values[key], fix="give a positive whole number" + (", or auto" if key in auto else ""))
    # What is not installed is said before the model is loaded.
    values |= make_backend(values["backend"], device, values["attention_backend"]).choice
    cfg[section] = values


class ModelPhase:
    """One model on one device.

    Args:
        cfg: of the experiment; its ``model``, where it was chosen, is the one that runs.
        section: name of the phase's settings, after :func:`resolve_section`.
    """

    def __init__(self, cfg: DictConfig, section: str) -> None:
        self.settings = settings = cfg[section]
        self.on_cuda = settings.device == "cuda"
        self.seed, self.max_model_len = cfg.seed, cfg.engine.max_model_len
        self.scheduler = replace(scheduler_config(cfg), max_tokens_per_step=settings.max_tokens_per_step)
        if not self.on_cuda:
            torch.set_num_threads(settings.cpu_threads)
        of: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "seed": cfg.seed}
        fields = None
        if settings.checkpoint is None:
            chosen = model_chosen(cfg) and cfg.model.name == settings.model
            fields = container(cfg.model.hf_config) if chosen else shipped_fields(settings.model)
        max_request_tokens(
            cfg, settings.model, (fields or {}).get("max_position_embeddings")
        )  # before anything is loaded
        self.model, self.tokenizer = load_for_inference(settings.model, fields, **of)
        longest = self.model.config.max_position_embeddings
        self.max_request_tokens = max_request_tokens(cfg, settings.model, longest)
        self.spec = CacheSpec.from_config(
            self.model.config, kv_dtype=settings.kv_dtype, state_dtype=settings.state_dtype
        )

    def memory(self, budget_bytes: int) -> CacheMemory:
        """What every strategy gets."""
        return CacheMemory(self.spec, budget_bytes, self.scheduler.max_running, self.max_request_tokens)

    def tuned(
        self, choices: Sequence[StrategyChoice], memory: CacheMemory, streams: Sequence[Workload]
    ) -> Sequence[StrategyChoice]:
        """The strategies; ``ratio: best`` is searched in simulation, for all streams together."""
        if not wants_ratio(choices):
            return choices
        cost_model = CostModel.from_config(self.model.config, self.spec, DeviceSpec())
        return with_best_ratio(choices, memory, streams, self.scheduler, cost_model)

    def engine(
        self,
        choice: StrategyChoice,
        memory: CacheMemory,
        recorder: Recorder | None = None,
        prefix: PrefixPolicy | None = None,
    ) -> Engine:
        """A new engine over the strategy's memory; without ``prefix`` it reuses nothing."""
        backend = make_backend(self.settings.backend, self.settings.device, self.settings.attention_backend)
        strategy = choice.build(memory, physical=True)
        return Engine(self.model, strategy, self.scheduler, backend, prefix=prefix, recorder=recorder)

    def columns(self, launches: Mapping[str, int], backend: str) -> dict[str, Any]:
        """The columns of a result row that say which code ran, on what, in which precision."""
        return {
            **cache_columns(self.spec),
            "model": self.settings.model,
            "seed": self.seed,
            "device": device_name() if self.on_cuda else "cpu",
            "backend": backend,
            "launches": json.dumps(dict(sorted(launches.items()))),
            "dtype": self.settings.dtype,
        }


def require_finished(label: str, engine: Engine, sequences: Iterable[EngineSequence]) -> None:
    """Raises RuntimeError where a request ended otherwise than by its length."""
    failed = {seq.seq_id: engine.error(seq.seq_id) for seq in sequences if seq.finish_reason != "length"}
    if failed:
        raise RuntimeError(f"{label}: {len(failed)} requests did not finish, the first: {failed.popitem()}")
