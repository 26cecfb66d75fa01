"""Tile sizes of GDN prefill's kernels by shape and device, and the compile-time parameters that follow from them.

Measured at the shape of Qwen3-Next on an H100 (``docs/LOG.md``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.devices import is_hopper, warn_once
from hybridcache.kernels.gdn_decode import L2NORM_EPS
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import power_of_2
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import dtype_name

ROW_TILE = 32
"""Rows that a program of the conv kernel looks at at once in search of its own: a warp's threads, so that each warp finds it
without the others."""
GATE_HEADS = 4
"""Value heads whose gates one program works out, for each of its warps."""

PROCESSORS = 132
"""Of an H100, taken where kernels are interpreted."""
THREE_PROGRAMS = 168
"""Registers per thread with which a multiprocessor runs three programs of 128 threads (65,536 / 384, in eights)."""
WIDE_ROUND, WIDE_ROUND_BESIDE_HOPPER = 1.6, 1.8
"""Measured on an H100: how long a chunk takes with 128 value dims a program, against 64 in Triton and in Gluon."""
LEAST_WIDE_ROUNDS = 4
"""With fewer rounds the longest row alone decides, and it is the sooner done the shorter a chunk takes. (8 rows of 1 to 4,000
tokens on an H100: 137 us in Gluon, 155 with 64 value dims in Triton, 186 with 128.)"""


@dataclass(frozen=True)
class Tiles:
    """Tiles choices. ``chunk`` tokens of a chunk; ``key_tile`` key dims per step of a chunk's products; ``value_tile``
    value dims of one program of the state kernel; ``stages`` its pipeline's depth; warps of the three main kernels; a
    limit of registers per thread of the chunk kernel; ``conv_steps`` slots that a thread of the conv kernel walks down;
    ``hopper`` takes :mod:`.hopper_state` for the states, whose tiles and warps are its own."""

    chunk: int
    key_tile: int
    value_tile: int
    stages: int
    state_warps: int
    chunk_warps: int = 4
    chunk_registers: int | None = None
    conv_warps: int = 8
    conv_steps: int = 8
    hopper: bool = False


def default_tiles(
    layout: StateLayout, dtype: torch.dtype, rows: int, processors: int, *, hopper: bool = False
) -> Tiles:
    """Tiles for a device like an H100 (``processors`` multiprocessors), chosen by the shape of a call alone. ``hopper``: the
    Gluon kernel may carry states.

    A program of a state kernel fills a multiprocessor's shared memory, so its launch takes as many rounds as its programs
    fill the device. A round of narrow value tiles is the shorter one, in Gluon still more; wide tiles, which read keys once,
    take fewer. float32 products take three passes of the matrix unit and many registers: small chunks. Registers suffice
    for all but float32 with a key dim beyond 128.
    """
    v_heads, key_dim, value_dim = layout.recurrent_shape
    block_k, head_v = padded(key_dim), padded(value_dim)
    if dtype == torch.float32:
        tiles = Tiles(chunk=16, key_tile=min(block_k, 32), value_tile=16, stages=1, state_warps=4)
    elif block_k > 128:
        tiles = Tiles(chunk=32, key_tile=block_k, value_tile=min(head_v, 32), stages=2, state_warps=8)
    else:
        tiles = Tiles(64, block_k, min(head_v, 64), stages=3, state_warps=4, chunk_registers=THREE_PROGRAMS)
    # Four channels a thread.
    warps = tiles.chunk // tiles.conv_steps * max(block_k, head_v) // (4 * 32)
    tiles = replace(tiles, conv_warps=min(max(warps, 1), 8))
    if why_not_hopper(layout, dtype, tiles) is not None:
        hopper = False
    if tiles.chunk == 64 and head_v % 128 == 0:
        heads = rows * v_heads
        rounds, wide_rounds = (-(-heads * (head_v // tile) // processors) for tile in (64, 128))
        wide_round = WIDE_ROUND_BESIDE_HOPPER if hopper else WIDE_ROUND
        if wide_rounds >= LEAST_WIDE_ROUNDS and wide_rounds * wide_round < rounds:
            return replace(tiles, value_tile=128, state_warps=8)
    return replace(tiles, hopper=hopper)


def why_not_hopper(layout: StateLayout, dtype: torch.dtype, tiles: Tiles) -> str | None:
    """Why :mod:`.hopper_state` cannot do a layout, an activation type and tiles; None where it can."""
    _, key_dim, value_dim = layout.recurrent_shape
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype={dtype_name(dtype)}: it takes float16 or bfloat16"
    if not 64 <= padded(key_dim) <= 128:
        return f"key_dim={key_dim}: it takes 33 to 128"
    if value_dim % 64 or value_dim != padded(value_dim):
        return f"value_dim={value_dim}: it takes powers of 2 from 64 on"
    return None if tiles.chunk == 64 else f"chunk={tiles.chunk}: it takes 64"


def choose(layout: StateLayout, x_TC: Tensor, rows: int) -> Tiles:
    """:func:`default_tiles` for inputs on their device. Where a Hopper device's Gluon kernel cannot carry the states, the
    reason is logged once."""
    return _choose(layout, x_TC.dtype, rows, x_TC.device)


@lru_cache(maxsize=1024)
def _choose(layout: StateLayout, dtype: torch.dtype, rows: int, device: torch.device) -> Tiles:
    hopper = is_hopper(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
    tiles = default_tiles(layout, dtype, rows, processors, hopper=hopper)
    reason = why_not_hopper(layout, dtype, tiles) if hopper else None
    if reason is not None:
        warn_once(__name__, f"GDN prefill carries states in Triton, not in the Gluon kernel for Hopper: {reason}")
    return tiles


@lru_cache
def constants(layout: StateLayout, dtype: torch.dtype, tiles: Tiles, checkpoints: bool) -> Mapping[str, Any]:
    """Compile-time parameters of all kernels, by name, for a layout, an activation dtype and tiles."""
    v_heads, key_dim, value_dim = layout.recurrent_shape
    # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
    exact = dtype == torch.float32 or interpreting()
    found = {
        "K_HEADS": (layout.conv_channels - v_heads * value_dim) // (2 * key_dim), "V_HEADS": v_heads,
        "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "WIDTH": layout.conv_kernel, "CHUNK": tiles.chunk,
        "LEVELS": tiles.chunk.bit_length() - 1, "ROWS": ROW_TILE,
        "GATE_HEADS": min(GATE_HEADS * tiles.conv_warps, power_of_2(v_heads)), "CONV_STEPS": tiles.conv_steps,
        "BLOCK_K": padded(key_dim), "KEY_TILE": tiles.key_tile, "HEAD_V": padded(value_dim),
        "BLOCK_V": tiles.value_tile, "STAGES": tiles.stages, "SCALE": key_dim**-0.5, "EPS": L2NORM_EPS,
        "CHECKPOINTS": checkpoints, "DOT": tl.float32 if exact else getattr(tl, dtype_name(dtype)),
        # Entries of these matrices and of their inverses lie between -1 and 1: float16 is the most exact 16-bit type.
        "SOLVE": tl.float32 if exact else tl.float16, "PRECISION": "tf32x3",
    }  # fmt: skip
    return MappingProxyType(found)


def padded(dim: int) -> int:
    """Columns of a head in scratch memory: a power of 2, at least the matrix unit's 16."""
    return max(16, power_of_2(dim))
