"""How paged decode cuts its work: the tile of keys and the number of splits, from the batch's shape and the device alone.

The kernel's bytes are nearly all K and V, so that what counts is how many of them are on their way at any time. With few
programs each multiprocessor runs one, whose large tiles keep enough loads in flight; with many it runs four with small
tiles, which all start at once instead of one wave after another.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import itemsize

MAX_SPLITS = 128
MIN_FILL = 0.85
"""Share of the multiprocessors that one program each must keep busy; with less, four programs each share the work more
evenly."""
WIDE_BYTES, NARROW_BYTES = 32 * 1024, 8 * 1024
"""K of a tile."""
MAX_KEYS = 128


@dataclass(frozen=True)
class Tiles:
    """Shape of a program's work and how it is launched."""

    keys: int
    """Of a tile; it has nothing to do with the size of a page."""
    num_warps: int
    num_stages: int
    programs_per_sm: int
    """Programs that a multiprocessor runs at once; splits fill no more."""
    dependent_launch: bool = True
    """Whether the reduction is launched so, where the device can (compute capability 9.0)."""


@dataclass(frozen=True)
class Processors:
    """What a device is for this kernel."""

    count: int
    dependent_launch: bool


@lru_cache
def processors(device: torch.device) -> Processors:
    """Of a CUDA device; 1 for the interpreter on a CPU."""
    if device.type != "cuda":
        return Processors(1, False)
    found = torch.cuda.get_device_properties(device)
    return Processors(found.multi_processor_count, found.major >= 9)


def head_tile(layout: AttentionLayout, num_heads: int, dtype: torch.dtype) -> int:
    """Query heads of one program: those of a KV head, as far as their results fit in registers."""
    group = num_heads // layout.num_kv_heads
    most = 16 if dtype == torch.float32 else 64
    return min(max(power_of_2(group), 16), most)


def head_programs(layout: AttentionLayout, num_heads: int, dtype: torch.dtype) -> int:
    """Programs of one row and split."""
    group = num_heads // layout.num_kv_heads
    return layout.num_kv_heads * ceil_div(group, head_tile(layout, num_heads, dtype))


def wide(layout: AttentionLayout, num_heads: int, dtype: torch.dtype) -> Tiles:
    """Few programs: large tiles, one program a multiprocessor."""
    return _tiles(layout, num_heads, dtype, WIDE_BYTES, programs_per_sm=1)


def narrow(layout: AttentionLayout, num_heads: int, dtype: torch.dtype) -> Tiles:
    """Many programs: small tiles, several programs a multiprocessor."""
    return _tiles(layout, num_heads, dtype, NARROW_BYTES, programs_per_sm=4)


def _tiles(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, tile_bytes: int, programs_per_sm: int) -> Tiles:
    """Float32 and more than 32 heads take more registers and shared memory: smaller tiles, fewer programs."""
    many_heads = head_tile(layout, num_heads, dtype) > 32
    row_bytes = power_of_2(max(layout.k_dim, layout.v_dim)) * dtype.itemsize
    keys = min(max(tile_bytes // row_bytes // (2 if many_heads else 1), 16), MAX_KEYS)
    if dtype == torch.float32:
        keys = 16
    if many_heads or dtype == torch.float32:
        programs_per_sm = min(programs_per_sm, 2)
    return Tiles(keys, num_warps=8 if many_heads else 4, num_stages=3, programs_per_sm=programs_per_sm)


def choose_tiles(
    layout: AttentionLayout, num_heads: int, dtype: torch.dtype, programs: int, multiprocessors: int
) -> Tiles:
    """The tiles for a layout, query heads and their dtype.

    Args:
        programs: programs of one split (rows x KV heads x tiles of query heads).
        multiprocessors: of the device.
    """
    busy = multiprocessors // programs * programs
    choose = wide if busy >= MIN_FILL * multiprocessors else narrow
    return choose(layout, num_heads, dtype)


def choose_splits(programs: int, max_tokens: int, multiprocessors: int, tiles: Tiles) -> int:
    """Splits of each row's tokens: as many as run at once, all in the first wave.

    Args:
        programs: see :func:`choose_tiles`.
        max_tokens: tokens that a row's table can hold. Under a CUDA graph that is far more than the row's context, and
            costs nothing: a split without tokens ends at once, and one tile of keys a split is fastest even for short
            contexts (``benchmarks/results/paged_decode-splits-h100.json``).
        multiprocessors: of the device.
    """
    wanted = tiles.programs_per_sm * multiprocessors // programs
    return max(1, min(wanted, ceil_div(max_tokens, tiles.keys), MAX_SPLITS))


def check_queries(layout: AttentionLayout, q: Tensor, scale: float) -> None:
    """What every paged attention in Triton needs.

    Raises:
        UserError: a latent KV (``v_dim=0``), a manager block of 2^31 elements or more, or a scale that is not positive.
        ValueError: queries that are not contiguous along their last dimension.
    """
    if layout.v_dim == 0:
        raise bad("v_dim", 0, "latent KV (MLA) has no Triton kernel; choose the torch backend")
    if layout.manager_stride // itemsize(layout.dtype) >= 1 << 31:
        raise bad("manager_stride", layout.manager_stride, "Triton reads blocks of fewer than 2^31 elements")
    if not scale > 0:
        raise bad("scale", scale, "the maximum of unscaled scores must be that of scaled ones; choose a scale above 0")
    if q.stride(-1) != 1:
        raise ValueError(f"q strides {q.stride()}: the last dimension must be contiguous")
