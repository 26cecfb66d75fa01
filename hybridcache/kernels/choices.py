"""Operations that have two kernels: one in Gluon for Hopper, and one in Triton for other devices, for what the first cannot do
and for shapes where it is the slower one. Each returns the language of the kernel that ran, and its result.
"""

from typing import Any

from torch import Tensor

from hybridcache.kernels.caches import AttentionCache, StateCache
from hybridcache.kernels.devices import is_hopper
from hybridcache.kernels.gdn_decode import triton as decode
from hybridcache.kernels.gdn_decode.tiles import SharedTiles, choose
from hybridcache.kernels.gdn_prefill import tiles as prefill_tiles
from hybridcache.kernels.gdn_prefill import triton as prefill
from hybridcache.kernels.paged_prefill import hopper, triton
from hybridcache.kernels.paged_prefill.tiles import choose_ring

Ran = tuple[str, Tensor]


def paged_prefill(cache: AttentionCache, q_THD: Tensor, *rest: Any) -> Ran:
    ring = choose_ring(cache, q_THD) if is_hopper(q_THD.device) else None
    if ring is not None:
        return "gluon", hopper.paged_prefill(cache, q_THD, *rest, ring=ring)
    return "triton", triton.paged_prefill(cache, q_THD, *rest)


def gdn_decode(cache: StateCache, x_BC: Tensor, *rest: Any) -> Ran:
    kind = (x_BC.shape[0], x_BC.dtype)
    if (tiles := cache.memo.get(kind)) is None:
        tiles = cache.memo[kind] = choose(cache.layout, x_BC)
    language = "gluon" if isinstance(tiles, SharedTiles) else "triton"
    return language, decode.gdn_decode(cache, x_BC, *rest, tiles=tiles)  # type: ignore[misc]


def gdn_prefill(cache: StateCache, x_TC: Tensor, *rest: Any, **checkpoints: Any) -> Ran:
    tiles = prefill_tiles.choose(cache.layout, x_TC, rest[8].shape[0])
    language = "gluon" if tiles.hopper else "triton"
    return language, prefill.gdn_prefill(cache, x_TC, *rest, **checkpoints, tiles=tiles)
