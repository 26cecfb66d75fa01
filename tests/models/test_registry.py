"""Models by name: what is known is made, what is not is refused by name, and importing the registry imports no model."""

import subprocess
import sys

import pytest
import torch

from hybridcache.errors import UserError
from models.configs import shipped_config
from models.registry import MODELS, build_model, make_model


def test_a_config_names_its_model():
    model = make_model(shipped_config("tiny"), "bfloat16", "meta")
    assert f"{type(model).__module__}:{type(model).__name__}" == MODELS["qwen3_next"]
    assert (model.dtype, model.device.type) == (torch.bfloat16, "meta")


def test_others_are_refused_by_name():
    with pytest.raises(UserError, match=r"model_type='jamba': inference runs qwen3_next"):
        build_model(shipped_config("jamba_v0_1"), "float32", "cpu")
    with pytest.raises(UserError, match=r"dtype='float8_e4m3fn': choose one of bfloat16, float16, float32, float64"):
        make_model(shipped_config("tiny"), "float8_e4m3fn", "cpu")


class Recorded:
    """A model that keeps what it was made of."""

    def __init__(self, *made_of) -> None:
        self.made_of = made_of


def test_another_model_is_one_entry(monkeypatch):
    """A class named in the table is imported and called with config, dtype and device."""
    monkeypatch.setitem(MODELS, "jamba", f"{__name__}:Recorded")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Recorded.__module__])
    config = shipped_config("jamba_v0_1")
    assert make_model(config, "float32", "meta").made_of == (config, torch.float32, torch.device("meta"))


def test_the_registry_imports_no_model():
    code = "import sys, models.registry; print(any(name.startswith('models.qwen3_next') for name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert found.stdout.strip() == "False"
