"""Hugging Face configs: built from a mapping of fields, and read so that no field is a default without anyone's saying."""

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from hybridcache.errors import bad


def transformers_config(fields: Mapping[str, Any]) -> Any:
    """A Transformers config built from its fields.

    Raises:
        UserError: ``model_type`` is missing or unknown to the installed Transformers, or it refuses a field.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(fields.get("model_type"))
    if not known_to_transformers(model_type):
        raise bad("model_type", model_type, f"Transformers {transformers.__version__} has no such model; upgrade it")
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    try:
        return transformers.AutoConfig.for_model(model_type, **rest)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        # Transformers validates some fields and merely computes with others, so a bad value may surface as any of these.
        reason = " ".join(str(error).split()) or type(error).__name__
        refusal = "Transformers refuses these fields, with its defaults for those that are not given"
        raise bad("hf_config", model_type, f"{refusal}: {reason}") from error


def known_to_transformers(model_type: str) -> bool:
    """Whether the installed Transformers has a config of that type."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


class Fields:
    """The fields of a config as attributes. It notes which of the fields that are read nobody gave, so that they hold
    Transformers' default, which is another model's.

    Args:
        config: a Transformers config, or an object with its fields.
        given: names of the fields that were given; None where that is not known.
    """

    def __init__(self, config: Any, given: Collection[str] | None) -> None:
        self._config, self._given = config, given
        self._defaults: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if self._given is not None and value is not None and name not in {*self._given, *self._defaults}:
            self._defaults.append(name)
        return value

    def require_given(self) -> None:
        """
        Raises:
            UserError: a field that was read was not given.
        """
        if self._defaults:
            names = ", ".join(self._defaults)
            raise bad("hf_config", self._config.model_type, f"gives no {names}; add what its caches depend on")


LAYER_TYPES_FROM = {
    "qwen3_next": ("full_attention_interval",),
    "qwen3_5_text": ("full_attention_interval",),
    "qwen3_5_moe_text": ("full_attention_interval",),
    "bamba": ("attn_layer_indices",),
    "nemotron_h": ("hybrid_override_pattern",),
    "jamba": ("attn_layer_period", "attn_layer_offset"),
    "lfm2": ("full_attn_idxs",),
}
"""Fields that Transformers makes ``layer_types`` from where they are not given themselves."""
OTHER_NAMES = {
    "nemotron_h": {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel"},
    "kimi_linear": {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
        "full_attn_layers": "layer_types",
    },
}
"""Other names of fields that Transformers reads; those of ``kimi_linear`` stand in its ``linear_attn_config``."""


def given_fields(hf_config: Any, config: Any) -> Collection[str] | None:
    """Names of the fields of ``config`` that the mapping ``hf_config`` gives, by whatever name; None where it is no
    mapping, or where nothing was filled in."""
    if not isinstance(hf_config, Mapping) or isinstance(config, SimpleNamespace):
        return None
    composite = config.model_type != hf_config["model_type"]
    fields = hf_config.get("text_config", {}) if composite else hf_config
    given = {"model_type", *fields}
    others = OTHER_NAMES.get(config.model_type, {})
    given |= {others[name] for name in {*fields, *fields.get("linear_attn_config", {})} if name in others}
    sources = LAYER_TYPES_FROM.get(config.model_type)
    if "layers_block_type" in given or (sources and given.issuperset(sources)):
        given.add("layer_types")
    if config.model_type == "nemotron_h":  # counts its layer types
        given.add("num_hidden_layers")
    return given
