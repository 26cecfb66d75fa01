"""What of Transformers' ``Qwen3NextConfig`` the model supports, checked before anything is allocated."""

import torch
from transformers import Qwen3NextConfig

from hybridcache.errors import bad
from hybridcache.spec.dtypes import torch_dtype

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary types whose frequencies do not depend on the sequence: a cached key is rotated once and for all."""


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
    rope = config.rope_parameters
    if rope["rope_type"] not in STATIC_ROPE:
        raise bad("rope_type", rope["rope_type"], f"choose one of {', '.join(STATIC_ROPE)}")
    rotary_dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    if rotary_dim % 2:
        raise bad(
            "partial_rotary_factor", rope.get("partial_rotary_factor"), f"rotates {rotary_dim} of head_dim; even only"
        )


def compute_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype to compute in.

    Raises:
        UserError: not one of bf16, fp16, fp32, fp64.
    """
    found = torch_dtype(dtype)
    if found not in COMPUTE_DTYPES:
        raise bad(
            "dtype", str(dtype), f"choose one of {', '.join(str(d).removeprefix('torch.') for d in COMPUTE_DTYPES)}"
        )
    return found
