"""Tile sizes of GDN prefill's kernels, and the compile-time parameters that follow from them and from a layout."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcache.dtypes import dtype_name
from hybridcache.kernels.addressing import interpreting
from hybridcache.kernels.gdn_decode import L2NORM_EPS
from hybridcache.layout import StateLayout

ROW_TILE = 128
"""Rows that a program of the conv kernel looks at at once in search of its own."""

THREE_PROGRAMS = 168
"""Registers per thread with which a multiprocessor runs three programs of 128 threads (65,536 / 384, in eights)."""
WIDE_ROUND = 1.6
"""Measured on an H100: how long a chunk takes with 128 value dims a program, against 64."""


@dataclass(frozen=True)
class Tiles:
    """Tuning choices. ``chunk`` tokens of a chunk; ``key_tile`` key dims per step of a chunk's products; ``value_tile``
    value dims of one program of the state kernel; ``stages`` its pipeline's depth; warps of the three main kernels; a
    limit of registers per thread of the chunk kernel; ``hopper`` takes :mod:`.hopper_state` for the states, whose tiles and
    warps are its own."""

    chunk: int
    key_tile: int
    value_tile: int
    stages: int
    state_warps: int
    chunk_warps: int = 4
    chunk_registers: int | None = None
    conv_warps: int = 4
    hopper: bool = False


def default_tiles(layout: StateLayout, dtype: torch.dtype, rows: int, processors: int) -> Tiles:
    """Tiles for an H100 (``processors`` multiprocessors), chosen by the shape of a call alone.

    A program of the state kernel fills a multiprocessor's shared memory, so its launch takes as many rounds as its
    programs fill the device. A round of narrow value tiles is the shorter one; wide tiles, which read keys once, take
    fewer. float32 products take three passes of the matrix unit and many registers: small chunks. Registers suffice for
    all but float32 with a key dim beyond 128.
    """
    v_heads, key_dim, value_dim = layout.recurrent_shape
    block_k, head_v = padded(key_dim), padded(value_dim)
    if dtype == torch.float32:
        return Tiles(chunk=16, key_tile=min(block_k, 32), value_tile=16, stages=1, state_warps=4)
    if block_k > 128:
        return Tiles(chunk=32, key_tile=block_k, value_tile=min(head_v, 32), stages=2, state_warps=8)
    narrow = Tiles(64, block_k, min(head_v, 64), stages=3, state_warps=4, chunk_registers=THREE_PROGRAMS)
    if head_v % 128:
        return narrow
    heads = rows * v_heads
    rounds, wide_rounds = (-(-heads * (head_v // tile) // processors) for tile in (64, 128))
    return replace(narrow, value_tile=128, state_warps=8) if wide_rounds * WIDE_ROUND < rounds else narrow


def constants(layout: StateLayout, dtype: torch.dtype, tiles: Tiles, checkpoints: bool) -> dict[str, Any]:
    """Compile-time parameters of all kernels, by name, for a layout, an activation dtype and tiles."""
    v_heads, key_dim, value_dim = layout.recurrent_shape
    # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
    exact = dtype == torch.float32 or interpreting()
    return {
        "K_HEADS": (layout.conv_channels - v_heads * value_dim) // (2 * key_dim),
        "V_HEADS": v_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "WIDTH": layout.conv_kernel,
        "CHUNK": tiles.chunk,
        "LEVELS": tiles.chunk.bit_length() - 1,
        "ROWS": ROW_TILE,
        "BLOCK_K": padded(key_dim),
        "KEY_TILE": tiles.key_tile,
        "HEAD_V": padded(value_dim),
        "BLOCK_V": tiles.value_tile,
        "STAGES": tiles.stages,
        "SCALE": key_dim**-0.5,
        "EPS": L2NORM_EPS,
        "CHECKPOINTS": checkpoints,
        "DOT": tl.float32 if exact else getattr(tl, dtype_name(dtype)),
        # Entries of these matrices and of their inverses lie between -1 and 1: float16 is the most exact 16-bit type.
        "SOLVE": tl.float32 if exact else tl.float16,
        "PRECISION": "tf32x3",
    }


def padded(dim: int) -> int:
    """Columns of a head in scratch memory: a power of 2, at least the matrix unit's 16."""
    return max(16, triton.next_power_of_2(dim))
