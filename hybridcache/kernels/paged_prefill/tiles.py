"""How paged prefill cuts its work: tiles of queries and keys, and which ones a model gets."""

from dataclasses import dataclass

import torch

from hybridcache.dtypes import itemsize
from hybridcache.layout import AttentionLayout


@dataclass(frozen=True)
class Tile:
    """Shape of a program's work and how it is launched."""

    queries: int
    """Rows of the matrix product: tokens x query heads."""
    keys: int
    num_warps: int
    num_stages: int


def choose_tile(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, max_query_len: int) -> Tile:
    """The tile for a model and the longest chunk of a step: what compiles without spills for Hopper and keeps its matrix
    unit busy.

    Args:
        max_query_len: tokens; a step of short chunks gets tiles of half as many queries.
    """
    if dtype == torch.float32:
        return Tile(queries=32, keys=16, num_warps=8, num_stages=1)
    wide = max(layout.k_dim, layout.v_dim) > 128
    if itemsize(layout.dtype) == 1 and wide:
        return Tile(queries=128, keys=32, num_warps=8, num_stages=3)
    if max_query_len * (num_heads // layout.num_kv_heads) <= 64:
        return Tile(queries=64, keys=32, num_warps=4, num_stages=3) if wide else Tile(64, 64, num_warps=4, num_stages=2)
    return Tile(queries=128, keys=64, num_warps=8, num_stages=2 if wide else 3)


def max_tiles(tokens: int, rows: int, tile_tokens: int) -> int:
    """Tiles of ``tokens`` tokens at most, however they are split among ``rows`` rows and what lies behind the last."""
    return (tokens + (rows + 1) * (tile_tokens - 1)) // tile_tokens
