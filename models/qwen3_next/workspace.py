"""What one forward pass holds at once beside weights and cache, as the Triton backend runs it on CUDA."""

import torch
from transformers import Qwen3NextConfig

from hybridcache.kernels.moe import router_rows

CHUNK = 64
"""Tokens of a chunk of GDN prefill; each row may begin and end with a part of one."""
GATES = 5
"""float32 numbers that GDN prefill keeps of every slot of a chunk and value head."""


def scratch_bytes(config: Qwen3NextConfig, dtype: torch.dtype, tokens: int, rows: int, prefilling: int) -> int:
    """Upper bound for a step of ``tokens`` tokens in ``rows`` rows, which all sample and of which ``prefilling`` prefill: the
    stream and its norm, and the layer that holds most, or the logits behind the last one."""
    size, hidden = dtype.itemsize, config.hidden_size
    # Stream, norm, what is still to be added, and angles with their float32 sines and cosines.
    stream = tokens * (3 * hidden * size + 4 * config.head_dim * 4)
    layers = max(
        _linear(config, size, tokens, prefilling), _attention(config, size, tokens), _experts(config, size, tokens)
    )
    return stream + max(layers, rows * (2 * hidden + config.vocab_size) * size)


def _linear(config: Qwen3NextConfig, size: int, tokens: int, prefilling: int) -> int:
    """Input projection, GDN prefill's scratch by chunks, its output, the gated norm's, the projected one."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    heads, values = config.linear_num_value_heads, config.linear_num_value_heads * config.linear_value_head_dim
    channels = 2 * keys + values
    slots = tokens + (2 * CHUNK - 2) * prefilling + CHUNK if prefilling else 0
    by_slot = (channels + 2 * heads * CHUNK) * size + heads * GATES * 4
    by_token = (channels + 3 * values + 2 * heads + config.hidden_size) * size
    return tokens * by_token + slots * by_slot


def _attention(config: Qwen3NextConfig, size: int, tokens: int) -> int:
    """Projected q, gate, k and v; q normed; attended and gated values, and those projected."""
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return tokens * (2 * q + 2 * kv + 3 * q + config.hidden_size) * size


def _experts(config: Qwen3NextConfig, size: int, tokens: int) -> int:
    """Of every assignment its sorted keys, its row of x, what is between the two products, and its result; of every token
    the router's logits, the shared expert's steps and the sum. Or a dense MLP's steps, where those are more."""
    hidden, k, inner = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
    shared = config.shared_expert_intermediate_size
    routed = k * (max(2 * hidden + inner, hidden + 3 * inner) * size + 64) if config.num_experts else 0
    by_token = routed + (router_rows(config.num_experts) + 3 * shared + 2 * hidden) * size
    return tokens * max(by_token, (3 * config.intermediate_size + hidden) * size)
