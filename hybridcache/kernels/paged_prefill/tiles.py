"""How paged prefill cuts its work: tiles of queries and keys, which ones a model gets, and what it refuses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridcache.errors import bad
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.paged_decode.tiles import check_queries
from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import dtype_name, itemsize

MAX_HEAD_DIM = 256
"""Beyond it an output tile outgrows the registers."""


@dataclass(frozen=True)
class Tiles:
    """Shape of a program's work and how it is launched."""

    queries: int
    """Rows of the matrix product: tokens x query heads."""
    keys: int
    num_warps: int
    num_stages: int


def choose_tiles(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, max_query_len: int) -> Tiles:
    """The tile for a model and the longest chunk of a step: what compiles without spills for Hopper and keeps its matrix
    unit busy.

    Args:
        max_query_len: tokens; a step of short chunks gets tiles of half as many queries.
    """
    if dtype == torch.float32:
        return Tiles(queries=32, keys=16, num_warps=8, num_stages=1)
    wide = max(layout.k_dim, layout.v_dim) > 128
    if itemsize(layout.dtype) == 1 and wide:
        return Tiles(queries=128, keys=32, num_warps=8, num_stages=3)
    if max_query_len * (num_heads // layout.num_kv_heads) <= 64:
        return (
            Tiles(queries=64, keys=32, num_warps=4, num_stages=3) if wide else Tiles(64, 64, num_warps=4, num_stages=2)
        )
    if wide and layout.kernel_block_tokens >= 64:
        # With the 64 keys of smaller blocks, Triton 3.6 spills 8 to 32 bytes here.
        return Tiles(queries=128, keys=32, num_warps=8, num_stages=3)
    return Tiles(queries=128, keys=64, num_warps=8, num_stages=2 if wide else 3)


def max_tiles(tokens: int, rows: int, tile_tokens: int) -> int:
    """Tiles of ``tokens`` tokens at most, however they are split among ``rows`` rows and what lies behind the last."""
    return (tokens + (rows + 1) * (tile_tokens - 1)) // tile_tokens


@dataclass(frozen=True)
class Ring:
    """Shape of the Hopper kernel's ring of K and V tiles, and the registers of a thread on either side of it.

    Two consumers and one producer of 128 threads each share 504 registers' worth.
    """

    keys: int
    slots: int
    consumer_registers: int
    producer_registers: int


RINGS = {256: Ring(64, 2, 224, 56), 128: Ring(128, 2, 216, 72), 64: Ring(64, 3, 224, 56)}
"""By head width."""


def choose_ring(cache: AttentionCache, q_THD: Tensor) -> Ring | None:
    """The ring of the Hopper kernel for a layout and queries, None where that kernel cannot do them: it copies K and V as
    they are, in 16-byte pieces, and its heads are as wide as a power of two."""
    layout = cache.layout
    group = q_THD.shape[1] // layout.num_kv_heads
    same = layout.k_dim == layout.v_dim and layout.token_stride[0] == layout.token_stride[1]
    copied = q_THD.dtype in (torch.bfloat16, torch.float16) and dtype_name(q_THD.dtype) == layout.dtype
    aligned = all(stride % 16 == 0 for stride in (*cache.strides.values(), *q_THD.stride()[:2]))
    aligned = aligned and q_THD.data_ptr() % 16 == 0
    return RINGS.get(layout.k_dim) if same and copied and aligned and group <= 128 else None


def check_inputs(layout: AttentionLayout, q_THD: Tensor, scale: float) -> None:
    """What every Triton prefill needs.

    Raises:
        UserError, ValueError: heads wider than 256, and what :func:`~hybridcache.kernels.paged_decode.tiles.check_queries`
            refuses.
    """
    check_queries(layout, q_THD, scale)
    width = max(layout.k_dim, layout.v_dim)
    if width > MAX_HEAD_DIM:
        raise bad("head_dim", width, f"Triton prefills heads of up to {MAX_HEAD_DIM}; choose the torch backend")
