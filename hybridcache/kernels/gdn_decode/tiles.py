"""How GDN decode is cut for a number of rows, a state dtype and a device, through registers or through shared memory.

Measured at the shape of Qwen3-Next on an H100, at 1, 8, 64 and 256 rows (three rounds:
``docs/LOG.md``). Few rows do not fill the device, so small tiles make more programs of them; many rows
want whole heads, whose bytes are contiguous, and as many of them on a multiprocessor as fit. In float32 registers hold as
much state as shared memory; in bfloat16 half as much.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.devices import capability, warn_once
from hybridcache.kernels.gdn_decode import L2NORM_EPS
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import torch_dtype


@dataclass(frozen=True)
class Tiles:
    """How a launch of ``triton.py`` is cut and compiled; the result is the same up to rounding.

    Raises:
        UserError: ``block_v`` is no power of two of 4 or more, or ``num_warps`` none of 1, 2, 4, 8.
    """

    block_v: int
    """Value dims of one program at most."""
    num_warps: int
    evict_first: bool = False
    """Tell the L2 cache that the state is not read again soon."""
    max_registers: int | None = None
    """Registers of a thread at most; None leaves it to the assembler."""
    dependent_launch: bool = False
    """Programmatic dependent launch: the grid is set up while the kernel before it ends (Hopper and later)."""
    conv_first: bool = False
    """The conv's loads go out before the state's, so that its arithmetic does not wait for the last of them."""

    def __post_init__(self) -> None:
        if self.block_v < 4 or self.block_v & (self.block_v - 1):
            raise bad("block_v", self.block_v, "choose a power of two from 4 on")
        if self.num_warps not in (1, 2, 4, 8):
            raise bad("num_warps", self.num_warps, "choose 1, 2, 4 or 8")


COPIED_BYTES = 16
"""Of one thread's access to a tile."""


@dataclass(frozen=True)
class SharedTiles:
    """How a launch is cut; the result is the same up to rounding.

    Raises:
        UserError: ``num_warps`` is none of 1, 2, 4, 8, or ``block_v`` or ``chunks`` is no power of two.
    """

    block_v: int
    """Value dims of one program."""
    num_warps: int
    chunks: int = 4
    """Parts of a tile, along the key dims, that are copied and waited for one by one."""
    evict_first: bool = False
    """Tell the L2 cache that the stored state is not read again soon (Triton gives ``cp.async`` no such hint)."""
    dependent_launch: bool = False
    """Programmatic dependent launch: the grid is set up while the kernel before it ends."""

    def __post_init__(self) -> None:
        if self.num_warps not in (1, 2, 4, 8):
            raise bad("num_warps", self.num_warps, "choose 1, 2, 4 or 8")
        for field in ("block_v", "chunks"):
            value = getattr(self, field)
            if value < 1 or value & (value - 1):
                raise bad(field, value, "choose a power of two")


@lru_cache
def why_not(layout: StateLayout, dtype: torch.dtype, tiles: SharedTiles) -> str | None:
    """What keeps this kernel from a layout and inputs of a dtype; None where it can do them."""
    _, key_dim, value_dim = layout.recurrent_shape
    state_dtype = torch_dtype(layout.recurrent_dtype)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or state_dtype == torch.float64:
        return f"{dtype} inputs and a {layout.recurrent_dtype} state: it computes in float32"
    if any(size & (size - 1) for size in (key_dim, layout.conv_kernel)):
        return f"key dim {key_dim} and conv width {layout.conv_kernel}: both must be powers of two"
    if value_dim % tiles.block_v:
        return f"{value_dim} value dims: no multiple of the {tiles.block_v} of a program"
    if tiles.block_v * state_dtype.itemsize < COPIED_BYTES:
        return f"{tiles.block_v} value dims: shorter than a copy of {COPIED_BYTES} B"
    rows = rows_at_once(tiles, state_dtype.itemsize)
    if key_dim % (tiles.chunks * rows):
        return f"key dim {key_dim}: {tiles.chunks} chunks of rows that are read {rows} at a time"
    if any(address % COPIED_BYTES for address in (layout.stride, *layout.base)):
        return f"states at {layout.base} + n * {layout.stride}: not aligned to copies of {COPIED_BYTES} B"
    return None


def rows_at_once(tiles: SharedTiles, itemsize: int) -> int:
    """Rows of a tile that one access of all threads covers."""
    lanes = min(32, tiles.block_v * itemsize // COPIED_BYTES)
    return 32 // lanes * tiles.num_warps


def shape_constants(
    layout: StateLayout, tiles: Tiles | SharedTiles, weight_stride_CW: tuple[int, int] | None
) -> dict[str, Any]:
    """Compile-time parameters that both kernels have."""
    v_heads, key_dim, value_dim = layout.recurrent_shape
    k_heads = (layout.conv_channels - v_heads * value_dim) // (2 * key_dim)
    stride_c, stride_w = weight_stride_CW or (layout.conv_kernel, 1)
    return {
        "WEIGHT_STRIDE_C": stride_c, "WEIGHT_STRIDE_W": stride_w, "V_HEADS": v_heads, "GROUP": v_heads // k_heads,
        "KEY_DIM": key_dim, "VALUE_DIM": value_dim, "CHANNELS": layout.conv_channels, "WIDTH": layout.conv_kernel,
        "EVICTION": "evict_first" if tiles.evict_first else "", "DEPENDENT_LAUNCH": tiles.dependent_launch,
        "SCALE": key_dim**-0.5, "EPS": L2NORM_EPS,
    }  # fmt: skip


VERY_FEW_ROWS, FEW_ROWS = 2, 16
"""Up to the first many rows states stay in the L2 cache from step to step; up to the second many they don't, but do not fill
the device either."""
SHARED_ROWS = {4: 64, 2: 32}
"""From this many rows on, by bytes of a state's element, states pass through shared memory."""


def in_registers(rows: int, state_dtype: torch.dtype) -> Tiles:
    """The cut of ``triton.py``, which can do any shape."""
    if rows <= VERY_FEW_ROWS:
        return Tiles(32, 1, dependent_launch=True)
    if rows <= FEW_ROWS:
        return Tiles(32, 1, dependent_launch=True, evict_first=True, conv_first=state_dtype.itemsize == 2)
    return Tiles(64, 2, dependent_launch=True)


def default_tiles(rows: int, state_dtype: torch.dtype) -> Tiles | SharedTiles:
    """The fastest cut on a Hopper GPU of those measured."""
    if rows >= SHARED_ROWS.get(state_dtype.itemsize, rows + 1):
        wide = state_dtype.itemsize == 4
        return SharedTiles(128, 4, chunks=8 if wide else 4, dependent_launch=True, evict_first=wide)
    return in_registers(rows, state_dtype)


def choose(layout: StateLayout, x_BC: Tensor) -> Tiles | SharedTiles:
    """:func:`default_tiles` where the device, the layout and the inputs allow it; else a cut in registers, and the reason is
    logged once. Dependent launch and the copies of ``hopper.py`` take compute capability 9.0 or later."""
    rows, state_dtype = x_BC.shape[0], torch_dtype(layout.recurrent_dtype)
    tiles, capable = default_tiles(rows, state_dtype), capability(x_BC.device) >= (9, 0)
    if isinstance(tiles, SharedTiles):
        reason = (
            why_not(layout, x_BC.dtype, tiles) if capable else f"{x_BC.device}: no compute capability of 9.0 or later"
        )
        if reason is not None:
            warn_once(__name__, f"GDN decode keeps states in registers, not in shared memory: {reason}")
            tiles = in_registers(rows, state_dtype)
    return tiles if capable else replace(tiles, dependent_launch=False)
