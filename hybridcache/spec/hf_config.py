"""Hugging Face configs: making one from a mapping, and reading its fields so that no missing one is filled in silently."""

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from hybridcache.errors import bad


def transformers_config(fields: Mapping[str, Any]) -> Any:
    """Build a Transformers config from its fields. Transformers fills in defaults for fields that are missing.

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
    """The fields of a config, as attributes. It notes those that are read although nobody gave them: they hold
    Transformers' defaults, which are the values of another model.

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
        """Refuse the config if a field that was read was not given.

        Raises:
            UserError: the message names these fields.
        """
        if self._defaults:
            names = ", ".join(self._defaults)
            raise bad(
                "hf_config", self._config.model_type, f"lacks {names}; give every field that the caches depend on"
            )


LAYER_TYPES_FROM = {
    "qwen3_next": ("full_attention_interval",),
    "qwen3_5_text": ("full_attention_interval",),
    "qwen3_5_moe_text": ("full_attention_interval",),
    "bamba": ("attn_layer_indices",),
    "nemotron_h": ("hybrid_override_pattern",),
    "jamba": ("attn_layer_period", "attn_layer_offset"),
    "lfm2": ("full_attn_idxs",),
}
"""``model_type`` -> fields that Transformers derives ``layer_types`` from where that is not given."""
OTHER_NAMES = {
    "nemotron_h": {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel"},
    "kimi_linear": {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
        "full_attn_layers": "layer_types",
    },
}
"""``model_type`` -> other names under which Transformers takes a field. Those of ``kimi_linear`` belong in its
``linear_attn_config``."""


def given_fields(hf_config: Any, config: Any) -> Collection[str] | None:
    """Names of those fields of ``config`` that its mapping ``hf_config`` gives, whatever it calls them. The result is None
    where ``hf_config`` is no mapping, and where Transformers filled in nothing."""
    if not isinstance(hf_config, Mapping) or isinstance(config, SimpleNamespace):
        return None
    composite = config.model_type != hf_config["model_type"]
    fields = (hf_config.get("text_config") or {}) if composite else hf_config
    if not isinstance(fields, Mapping):  # a config object as the text part
        return None
    given = {"model_type", *fields}
    others = OTHER_NAMES.get(config.model_type, {})
    given |= {others[name] for name in {*fields, *(fields.get("linear_attn_config") or {})} if name in others}
    sources = LAYER_TYPES_FROM.get(config.model_type)
    if "layers_block_type" in given or (sources and given.issuperset(sources)):
        given.add("layer_types")
    if config.model_type == "nemotron_h":  # Transformers counts the layer types
        given.add("num_hidden_layers")
    return given
