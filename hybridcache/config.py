"""The typed root of every configuration (Hydra structured config). Groups are the YAML files in ``conf/``.

Hydra checks names and types against these classes: a misspelt key is an error, not a silent no-op. Options of a strategy
and of a workload stay free-form, because a user may plug in a class of their own; those classes check them.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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


def register() -> None:
    """Make ``base_config`` known to Hydra. Called once by ``run.py``; calling it again changes nothing."""
    ConfigStore.instance().store(name="base_config", node=Config)
