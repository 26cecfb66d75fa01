"""The typed part of every configuration: names and types of what ``conf/config.yaml`` and its groups may hold.

A misspelt key or a wrong type is an error, not a silent no-op. An experiment's own keys stay open, and so do options of
strategies and workloads, because a user may plug in a class of their own; those classes check them.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ModelConfig:
    """``conf/model/``: fields of a Transformers configuration under a shipped name."""

    name: str = MISSING
    hf_config: dict[str, Any] = MISSING


@dataclass
class EngineConfig:
    """``conf/engine/``: the scheduler's policies (see ``SchedulerConfig``)."""

    max_running: int = 256
    max_tokens_per_step: int = 8192
    chunk_multiple: int = 64
    admission: str = "whole_prompt"
    victim: str = "last"
    watermark: float = 0.0


@dataclass
class TrackingConfig:
    """``conf/tracking/``: Weights & Biases."""

    mode: str = "offline"
    project: str = "hybridcache"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    dir: str | None = None


@dataclass
class Config:
    """The whole configuration. Each experiment adds its own keys below ``experiment_name``."""

    experiment_name: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    workload: dict[str, Any] = MISSING
    engine: EngineConfig = field(default_factory=EngineConfig)
    device: dict[str, Any] = MISSING
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    kv_dtype: str = "bfloat16"
    state_dtype: str = "float32"
    tp_size: int = 1
    seed: int = 0
    fast: bool = False


def typed(cfg: DictConfig) -> DictConfig:
    """``cfg`` with its typed part checked and converted.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key that the typed part does not know, or a value of a wrong type.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    known = {key.name: plain[key.name] for key in fields(Config) if key.name in plain}
    checked = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(known))
    return OmegaConf.create({**plain, **OmegaConf.to_container(checked)})  # type: ignore[dict-item, return-value]
