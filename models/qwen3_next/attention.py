"""Full attention: q/k norm, partial rotary, paged KV, and an output gate.

Shapes: T tokens, D hidden, H query heads, K KV heads, E head dim.
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import Qwen3NextConfig

from models.layers.norms import RMSNorm
from models.layers.parameters import Slot, Slots, parameter
from models.layers.step import Step


class Attention(nn.Module):
    """One attention layer; ``ordinal`` numbers it among the attention layers, as the KV layout does.

    ``qkv`` stacks the rows of ``q_proj`` (``[query | gate]`` per head), ``k_proj`` and ``v_proj``.
    """

    def __init__(self, config: Qwen3NextConfig, ordinal: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ordinal = ordinal
        self.head_dim, self.kv_heads = config.head_dim, config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        self.sizes = [
            2 * config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        ]
        hidden, attended = config.hidden_size, config.num_attention_heads * config.head_dim
        self.qkv = parameter(sum(self.sizes), hidden, dtype=dtype, device=device)
        self.out = parameter(hidden, attended, dtype=dtype, device=device)
        self.qkv_bias = self.out_bias = None
        if config.attention_bias:
            self.qkv_bias = parameter(sum(self.sizes), dtype=dtype, device=device)
            self.out_bias = parameter(hidden, dtype=dtype, device=device)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)

    def forward(self, x_TD: Tensor, step: Step) -> Tensor:
        """Normalises and rotates q and k, stores the step's K and V, then attends: decode rows first, prefilling rows behind
        them."""
        qg, k, v = F.linear(x_TD, self.qkv, self.qkv_bias).split(self.sizes, dim=1)
        q_THE, gate_THE = rearrange(qg, "t (h qg e) -> qg t h e", qg=2, e=self.head_dim)
        k_TKE, v_TKE = (x.unflatten(1, (self.kv_heads, self.head_dim)) for x in (k, v))
        cache, batch, n = step.caches.attention[self.ordinal], step.batch, step.batch.num_decode
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, step.cos_TP, step.sin_TP)
        tables = (batch.kv_table_BN, batch.row_T, batch.position_T)
        q_THE = cache.qk_norm_rope_store(q_THE, k_TKE, v_TKE, *norms, *tables)
        # Each kind of rows goes into its part of what the output projection reads.
        out_THE = torch.empty(gate_THE.shape, dtype=gate_THE.dtype, device=gate_THE.device)
        if n:
            rows = step.decoding
            decoded = cache.paged_decode(q_THE[:n], rows.kv_table_BN, rows.context_len_B, self.scale)
            step.backend.sigmoid_mul(decoded, gate_THE[:n], out_THE[:n])
        if step.has_prefill:
            rows = step.prefilling
            prefilled = cache.paged_prefill(
                q_THE[n:], rows.kv_table_BN, batch.prefill_cu_seqlens, rows.context_len_B, self.scale,
                batch.max_prefill_len, batch.max_context_len,
            )  # fmt: skip
            step.backend.sigmoid_mul(prefilled, gate_THE[n:], out_THE[n:])
        return F.linear(out_THE.flatten(1), self.out, self.out_bias)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        for name, rows in zip("qkv", self.qkv.split(self.sizes)):
            yield f"{prefix}{name}_proj.weight", Slot.of(rows)
        yield f"{prefix}o_proj.weight", Slot.of(self.out)
        if self.qkv_bias is not None and self.out_bias is not None:
            for name, rows in zip("qkv", self.qkv_bias.split(self.sizes)):
                yield f"{prefix}{name}_proj.bias", Slot.of(rows)
            yield f"{prefix}o_proj.bias", Slot.of(self.out_bias)
        yield from self.q_norm.slots(f"{prefix}q_norm.", names)
        yield from self.k_norm.slots(f"{prefix}k_norm.", names)

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in (self.qkv, self.out):
            weight.normal_(0.0, std, generator=generator)
        for bias in (self.qkv_bias, self.out_bias):
            if bias is not None:
                bias.zero_()
        self.q_norm.init_weights(std, generator)
        self.k_norm.init_weights(std, generator)
