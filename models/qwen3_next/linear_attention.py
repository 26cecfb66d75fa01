"""Linear attention: projections and the output norm around the backend's gated delta net.

Shapes: T tokens, D hidden, C conv channels (``q | k | v``), K key heads, V value heads, E key dim, F value dim, W conv
width.
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import Qwen3NextConfig

from models.layers.norms import GatedRMSNorm
from models.layers.parameters import Slot, Slots, at_least_float32, parameter
from models.layers.step import Step


class LinearAttention(nn.Module):
    """One gated delta net; ``ordinal`` numbers it among the linear layers, as the state layout does.

    ``conv_WC`` keeps the channels of one tap together, as kernels load them. ``in_proj`` stacks the rows of every input
    projection as ``q | k | v | z | b | a``, heads in order within each, so that the conv's input is a slice of its output.
    Checkpoints interleave them by key head (Transformers' ``fix_query_key_value_ordering``); the slots sort them once, at
    loading.
    """

    def __init__(self, config: Qwen3NextConfig, ordinal: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ordinal = ordinal
        self.key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.channels = 2 * keys + values
        self.sizes = [self.channels, values, self.value_heads, self.value_heads]
        exact = at_least_float32(dtype)
        self.in_proj = parameter(sum(self.sizes), config.hidden_size, dtype=dtype, device=device)
        self.conv_WC = parameter(config.linear_conv_kernel_dim, self.channels, dtype=dtype, device=device)
        self.a_log = parameter(self.value_heads, dtype=exact, device=device)
        self.dt_bias = parameter(self.value_heads, dtype=exact, device=device)
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps, dtype, device)
        self.out = parameter(config.hidden_size, values, dtype=dtype, device=device)

    def forward(self, x_TD: Tensor, step: Step) -> Tensor:
        """Advances the state of every row: decode rows first, prefilling rows behind them."""
        x_TC, z, b_TV, a_TV = F.linear(x_TD, self.in_proj).split(self.sizes, dim=1)
        cache, batch, n = step.caches.states[self.ordinal], step.batch, step.batch.num_decode
        weight_CW, gates, norm = self.conv_WC.t(), (self.a_log, self.dt_bias), self.norm
        gate_TVF = z.unflatten(1, (self.value_heads, self.value_dim))
        # Each kind of rows goes into its part of what the output projection reads.
        out_TVF = torch.empty(gate_TVF.shape, dtype=z.dtype, device=z.device)
        if n:
            rows = step.decoding
            tables = (rows.state_read_BL, rows.state_write_BL, batch.position_T[:n])
            decoded = cache.gdn_decode(x_TC[:n], weight_CW, a_TV[:n], b_TV[:n], *gates, *tables)
            step.backend.gated_norm(decoded, gate_TVF[:n], norm.weight, norm.eps, out_TVF[:n])
        if step.has_prefill:
            rows = step.prefilling
            prefilled = cache.gdn_prefill(
                x_TC[n:], weight_CW, a_TV[n:], b_TV[n:], *gates, rows.state_read_BL, rows.state_write_BL,
                batch.prefill_cu_seqlens, batch.prefill_start_P, batch.checkpoint_table_PNL,
                batch.checkpoint_interval,
            )  # fmt: skip
            step.backend.gated_norm(prefilled, gate_TVF[n:], norm.weight, norm.eps, out_TVF[n:])
        return F.linear(out_TVF.flatten(1), self.out)

    def slots(self, prefix: str, names: Container[str]) -> Slots:
        hidden = self.in_proj.shape[1]
        yield f"{prefix}in_proj_qkvz.weight", Slot((self.channels + self.sizes[1], hidden), self._write_qkvz)
        yield f"{prefix}in_proj_ba.weight", Slot((2 * self.value_heads, hidden), self._write_ba)
        yield f"{prefix}conv1d.weight", Slot.of(self.conv_WC.t().unsqueeze(1))
        yield f"{prefix}A_log", Slot.of(self.a_log)
        yield f"{prefix}dt_bias", Slot.of(self.dt_bias)
        yield from self.norm.slots(f"{prefix}norm.", names)
        yield f"{prefix}out_proj.weight", Slot.of(self.out)

    def _write_qkvz(self, source: Tensor) -> None:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self._write_by_key_head(source, self.in_proj[: self.channels + values], [keys, keys, values, values])

    def _write_ba(self, source: Tensor) -> None:
        self._write_by_key_head(source, self.in_proj[-2 * self.value_heads :], [self.value_heads, self.value_heads])

    def _write_by_key_head(self, source: Tensor, rows: Tensor, sizes: list[int]) -> None:
        """Rows grouped by key head, sections of every group in order, to whole sections with key heads in order."""
        by_head = rearrange(source, "(k n) d -> k n d", k=self.key_heads)
        groups = by_head.split([size // self.key_heads for size in sizes], dim=1)
        for section, group in zip(rows.split(sizes), groups):
            section.copy_(rearrange(group, "k n d -> (k n) d"))

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        for weight in (self.in_proj, self.conv_WC, self.out):
            weight.normal_(0.0, std, generator=generator)
        # Kept away from 0, whose logarithm is -inf.
        self.a_log.uniform_(0.01, 16.0, generator=generator).log_()
        self.dt_bias.fill_(1.0)
        self.norm.init_weights(std, generator)
