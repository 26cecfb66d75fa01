"""Refuses configs that the model would compute wrongly."""

from transformers import Qwen3NextConfig

from hybridcache.errors import bad
from models.layers.rotary import check_rotary


def check_config(config: Qwen3NextConfig) -> None:
    """Refuse a config that the model would compute wrongly.

    Raises:
        UserError: naming the field, the value and what is supported.
    """
    if config.model_type != "qwen3_next":
        raise bad("model_type", config.model_type, "this model runs qwen3_next")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise bad("quantization_config", str(method), "quantised checkpoints are not supported; give the bf16 one")
    if config.hidden_act not in ("silu", "swish"):
        raise bad("hidden_act", config.hidden_act, "the kernels compute silu")
    for kind in config.layer_types:
        if kind not in ("linear_attention", "full_attention"):
            raise bad("layer_types", kind, "choose linear_attention or full_attention for each layer")
    if len(config.layer_types) != config.num_hidden_layers:
        raise bad(
            "layer_types", f"{len(config.layer_types)} entries", f"give one per layer: {config.num_hidden_layers}"
        )
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(config, many) % getattr(config, few):
            raise bad(many, getattr(config, many), f"must be a multiple of {few}={getattr(config, few)}")
    if config.num_experts and not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise bad("num_experts_per_tok", config.num_experts_per_tok, f"choose 1 to num_experts={config.num_experts}")
    check_rotary(config)
