"""Random layouts, tables and inputs for the tests and benchmarks of kernels.

Pools start poisoned: every byte is 0xFF, which every element type reads as NaN, and only what a kernel may read is written.
Shapes: T tokens, B rows, N table entries, L layers, H query heads, K key (KV) heads, V value heads, D head dim, C conv
channels, W conv kernel width, S tokens of one request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridcache.kernels.caches import StateCache, cache_of
from hybridcache.memory.layout import AttentionLayout, StateLayout, attention_layout, state_layout
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.spec.dtypes import itemsize, torch_dtype

POISON_BYTE = 0xFF


def rel_error(out: Tensor, reference: Tensor) -> float:
    """``||out - reference|| / ||reference||`` in float64; NaN where either holds one."""
    out, reference = out.double(), reference.double()
    return ((out - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def cached(buffer: Tensor, layout: AttentionLayout | StateLayout, layer: int, *inputs: Any) -> tuple[Any, ...]:
    """Arguments of an implementation: the layer's cache, then the inputs."""
    return (cache_of(buffer, layout, layer), *inputs)


def poisoned(num_bytes: int, device: str | torch.device) -> Tensor:
    """A pool of NaN patterns."""
    return torch.full((num_bytes,), POISON_BYTE, dtype=torch.uint8, device=device)


@dataclass
class AttentionCase:
    """A paged KV cache with requests in it. A row of length 0 is a padding row: its table is -1, its length stale."""

    buffer: Tensor
    layout: AttentionLayout
    kv_table_BN: Tensor
    context_len_B: Tensor
    lengths: tuple[int, ...]


def attention_case(
    generator: torch.Generator, *, lengths: Sequence[int], order: str = "block_major", layers: int = 2,
    kernel_block_tokens: int = 8, kernel_blocks: int = 11, kv_heads: int = 2, k_dim: int = 256, v_dim: int = 256,
    dtype: str = "bfloat16", device: str | torch.device = "cpu", pool_bytes: int = 0, extra_entries: int = 1,
    fill: Sequence[int] | None = None,
) -> AttentionCase:  # fmt: skip
    """Requests of ``lengths`` tokens in shuffled blocks of a poisoned pool, K and V standard normal.

    Args:
        generator: of the CPU.
        order: ``block_major`` (a manager block holds all layers) or ``layer_major`` (each layer has a region of its own,
            and blocks of one layer are contiguous).
        kernel_blocks: kernel blocks of a table entry; 1 makes ``Tm = kb``.
        pool_bytes: make the pool at least that large and use blocks all over it, the last one included.
        extra_entries: table columns beyond the longest request.
        fill: layers to write; all where None.
    """
    kv = AttentionKV(kv_heads, k_dim, v_dim, dtype)
    spec = CacheSpec("kernels", tuple(LayerSpec(i, kv, None) for i in range(layers)))
    entry_tokens = kernel_block_tokens * kernel_blocks
    entry_bytes = entry_tokens * kv.bytes_per_token
    entries = [-(-length // entry_tokens) for length in lengths]
    blocks = max(sum(entries) + 3, pool_bytes // (entry_bytes * layers))
    layer_bytes = kernel_block_tokens * kv.bytes_per_token
    if order == "block_major":
        base = tuple(i * layer_bytes for i in range(layers))
        strides = {"manager_stride": entry_bytes * layers, "kernel_stride": layer_bytes * layers}
    elif order == "layer_major":
        base = tuple(i * blocks * entry_bytes for i in range(layers))
        strides = {"manager_stride": entry_bytes, "kernel_stride": layer_bytes}
    else:
        raise ValueError(f"order={order!r}: choose block_major or layer_major")
    layout = attention_layout(
        spec, base=base, tokens_per_entry=entry_tokens, kernel_block_tokens=kernel_block_tokens, **strides
    )
    free = [blocks - 1, *torch.randperm(blocks - 1, generator=generator).tolist()]
    table_BN = torch.full((len(lengths), max(max(entries), 1) + extra_entries), -1, dtype=torch.int32)
    for row, count in enumerate(entries):
        table_BN[row, :count] = torch.tensor(free[:count], dtype=torch.int32)
        del free[:count]
    stale = torch.tensor([length or 5 for length in lengths], dtype=torch.int32)
    buffer = poisoned(blocks * entry_bytes * layers, device)
    case = AttentionCase(buffer, layout, table_BN.to(device), stale.to(device), tuple(lengths))
    for layer in range(layers) if fill is None else fill:
        for row, length in enumerate(lengths):
            for which in range(2 if length and v_dim else 1 if length else 0):
                shape = (length, kv_heads, v_dim if which else k_dim)
                values = normal(generator, shape, buffer.device, dtype)
                buffer[byte_index(case, layer, row, which)] = values.view(torch.uint8)
    return case


def byte_index(case: AttentionCase, layer: int, row: int, kv: int) -> Tensor:
    """Addresses of all bytes of one request's K (``kv=0``) or V, by the layout formula: int64 ``[S, K, bytes]``."""
    at, device = case.layout, case.buffer.device
    position_S = torch.arange(case.lengths[row], device=device)
    inside_S = position_S % at.tokens_per_entry
    entry_S = case.kv_table_BN[row][position_S // at.tokens_per_entry].long()
    start_S = at.base[layer] + entry_S * at.manager_stride + kv * at.kv_stride
    start_S += inside_S // at.kernel_block_tokens * at.kernel_stride
    start_S += position_S % at.kernel_block_tokens * at.token_stride[kv]
    start_SK = start_S[:, None] + torch.arange(at.num_kv_heads, device=device) * at.head_stride[kv]
    return start_SK[:, :, None] + torch.arange((at.v_dim if kv else at.k_dim) * itemsize(at.dtype), device=device)


@dataclass
class StateCase:
    """Stored states of B requests and the inputs of one decode step. A row whose table is -1 is a padding row."""

    buffer: Tensor
    layout: StateLayout
    state_read_BL: Tensor
    state_write_BL: Tensor
    position_B: Tensor
    x_BC: Tensor
    conv_weight_CW: Tensor
    a_BV: Tensor
    b_BV: Tensor
    a_log_V: Tensor
    dt_bias_V: Tensor

    def step(self, layer: int) -> tuple:
        """Layout, layer and inputs of ``gdn_decode``."""
        inputs = (self.x_BC, self.conv_weight_CW, self.a_BV, self.b_BV, self.a_log_V, self.dt_bias_V)
        return (self.layout, layer, *inputs, self.state_read_BL, self.state_write_BL, self.position_B)


def state_case(
    generator: torch.Generator, *, positions: Sequence[int], order: str = "block_major", layers: int = 2,
    k_heads: int = 16, v_heads: int = 32, key_dim: int = 128, value_dim: int = 128, width: int = 4,
    state_dtype: str = "float32", conv_dtype: str = "bfloat16", dtype: str = "bfloat16",
    device: str | torch.device = "cpu", pool_bytes: int = 0, apart: bool = False, spare: int = 0,
) -> StateCase:  # fmt: skip
    """States of requests at ``positions`` in shuffled slots of a poisoned pool; position -1 makes a padding row.

    Args:
        apart: each state is written to another slot than it is read from, and rows at position 0 read none (-1).
        spare: slots more than these need.

    At position 0 the whole state stays poisoned, and so do ring columns of positions that were never seen.
    """
    channels = 2 * k_heads * key_dim + v_heads * value_dim
    state = RecurrentState((v_heads, key_dim, value_dim), state_dtype, channels, width, conv_dtype)
    spec = CacheSpec("kernels", tuple(LayerSpec(i, None, state) for i in range(layers)))
    slots = max(len(positions) * layers * (2 if apart else 1) + 3 + spare, pool_bytes // state.stored_bytes)
    if order == "block_major":
        base, entries = (0,) * layers, slots
    elif order == "layer_major":
        entries = slots // layers + 1
        base = tuple(i * entries * state.stored_bytes for i in range(layers))
        slots = entries * layers
    else:
        raise ValueError(f"order={order!r}: choose block_major or layer_major")
    layout = state_layout(spec, base=base, stride=state.stored_bytes)
    buffer = poisoned(slots * state.stored_bytes, device)

    read_BL, write_BL = (torch.full((len(positions), layers), -1, dtype=torch.int32) for _ in range(2))
    shuffled = [[entries - 1, *torch.randperm(entries - 1, generator=generator).tolist()] for _ in range(layers)]
    for layer in range(layers):
        free = shuffled[0 if order == "block_major" else layer]
        for row, position in enumerate(positions):
            if position >= 0:
                write_BL[row, layer] = free.pop(0)
                read_BL[row, layer] = (free.pop(0) if position else -1) if apart else write_BL[row, layer]
                _fill_state(generator, StateCache(buffer, layout, layer), int(read_BL[row, layer]), position)
    read_BL, write_BL = read_BL.to(device), write_BL.to(device)

    def inputs(*shape: int) -> Tensor:
        return normal(generator, shape, buffer.device, dtype)

    rows = len(positions)
    return StateCase(
        buffer=buffer, layout=layout, state_read_BL=read_BL if apart else write_BL, state_write_BL=write_BL,
        position_B=torch.tensor([max(position, 0) for position in positions], device=device),
        x_BC=inputs(rows, channels), conv_weight_CW=inputs(channels, width) / width**0.5, a_BV=inputs(rows, v_heads),
        b_BV=inputs(rows, v_heads),
        a_log_V=torch.rand(v_heads, generator=generator).mul(16).add(0.01).log().to(device),
        dt_bias_V=inputs(v_heads).float() - 3.0,
    )  # fmt: skip


def _fill_state(generator: torch.Generator, cache: StateCache, entry: int, position: int) -> None:
    if position == 0:
        return
    state_VIJ, ring_WC = cache.stored(entry)
    width, device = ring_WC.shape[0], ring_WC.device
    state_VIJ.copy_(normal(generator, state_VIJ.shape, device, state_VIJ.dtype) * 0.1)
    for past in range(max(position - width + 1, 0), position):
        ring_WC[past % width] = normal(generator, ring_WC.shape[1:], device, ring_WC.dtype)


def normal(generator: torch.Generator, shape: Sequence[int], device: torch.device, dtype: str | torch.dtype) -> Tensor:
    """Standard normal values; on CUDA they are drawn there, seeded from ``generator``."""
    if device.type == "cuda":
        seed = int(torch.randint(1 << 62, (1,), generator=generator))
        generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), device=device, generator=generator).to(torch_dtype(dtype))
