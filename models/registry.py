"""Models that inference runs, by ``model_type``: random weights from a seed, or a Hugging Face checkpoint.

A model class is imported when one of its configs is used. ``Model(config, dtype, device)`` checks the config and allocates
uninitialised weights; ``init_weights(seed)`` draws them, ``slots(names)`` says where a checkpoint's tensors go, and the rest is
what the engine needs (:class:`hybridcache.engine.runner.Model`). A new model is a package beside this module and an entry in
:data:`MODELS`.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from hybridcache.errors import bad
from hybridcache.spec.architectures import transformers_config
from hybridcache.spec.dtypes import torch_dtype
from models.layers.checkpoint import load_weights

MODELS = {"qwen3_next": "models.qwen3_next.model:Qwen3Next"}
"""Class of each ``model_type``."""
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def make_model(config: Any, dtype: str | torch.dtype, device: str | torch.device) -> Any:
    """A model of a Transformers config, its weights uninitialised (on ``meta`` they take no memory).

    Raises:
        UserError: a config or dtype that the model does not support.
    """
    if config.model_type not in MODELS:
        raise bad("model_type", config.model_type, f"inference runs {', '.join(MODELS)}")
    module, name = MODELS[config.model_type].split(":")
    found = torch_dtype(dtype)
    if found not in COMPUTE_DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in COMPUTE_DTYPES)
        raise bad("dtype", str(dtype), f"choose one of {names}")
    return getattr(import_module(module), name)(config, found, torch.device(device))


def build_model(config: Any, dtype: str | torch.dtype, device: str | torch.device, seed: int = 0) -> Any:
    """A model with random weights, drawn on the device itself (the same seed gives the same weights on one device and
    dtype).

    Raises:
        UserError: a config or dtype that the model does not support.
    """
    model = make_model(config, dtype, device)
    model.init_weights(seed)
    return model.eval()


def load_model(folder: str | Path, dtype: str | torch.dtype, device: str | torch.device) -> Any:
    """A model from a checkpoint folder: ``config.json`` and safetensors as
    :func:`~models.layers.checkpoint.load_weights` takes them.

    Raises:
        UserError: no such folder, config or file; a config, dtype or quantisation that the model does not support; tensors
            that do not fit the config.
    """
    config = read_config(Path(folder))
    return load_weights(Path(folder), lambda where: make_model(config, dtype, where), str(device)).eval()


def read_config(folder: Path) -> Any:
    """The folder's ``config.json`` as a Transformers config.

    Raises:
        UserError: it is not there, is no JSON, or is of an architecture that inference does not run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise bad("model", str(folder), "has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise bad("model", str(path), f"is not JSON ({error})") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in MODELS:
        raise bad("model_type", kind, f"{path}: only {', '.join(MODELS)} checkpoints can be loaded")
    return transformers_config(fields)
