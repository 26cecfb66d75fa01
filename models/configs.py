"""Shipped model configs: ``conf/model/<name>.yaml``, for use without Hydra.

Inference runs the Qwen3-Next ones; the others serve geometry and simulation.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hybridcache.errors import bad
from hybridcache.spec.hf_config import transformers_config


def shipped_names() -> list[str]:
    """Names that :func:`shipped_config` takes, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def shipped_fields(name: str) -> dict[str, Any]:
    """The config's fields as they stand in the file, ``model_type`` included.

    Raises:
        UserError: there is no such config; the message lists the names.
    """
    if name not in shipped_names():
        raise bad("model", name, f"choose one of {', '.join(shipped_names())}")
    loaded = OmegaConf.create(_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    fields = OmegaConf.to_container(loaded.hf_config, resolve=True)
    assert isinstance(fields, dict)
    return {str(key): value for key, value in fields.items()}


def shipped_config(name: str) -> Any:
    """The Transformers config of that name.

    Raises:
        UserError: there is no such config, or the installed Transformers has no such architecture.
    """
    return transformers_config(shipped_fields(name))


def _folder() -> Path:
    return Path(__file__).resolve().parent.parent / "conf" / "model"
