"""KV store in Triton: K and V of a step's tokens, one launch.

A program writes one token's K and V rows of up to ``BLOCK_H`` heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.pool_rows import row_offset
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import AttentionLayout

OPTIONS = {"num_warps": 4}
"""Of a launch."""
TILE_ELEMENTS = 4096
"""Elements of K (and of V) that one program writes at most."""


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "row_ptr", "position_ptr"])
def kv_store_kernel(
    pool_ptr, k_ptr, v_ptr, table_ptr, row_ptr, position_ptr,
    table_stride: tl.int64, k_stride_t: tl.int64, k_stride_h: tl.int64, v_stride_t: tl.int64, v_stride_h: tl.int64,
    base: tl.int64, manager_stride: tl.int64, kernel_stride: tl.int64, kv_stride: tl.int64, k_token_stride: tl.int64,
    v_token_stride: tl.int64, k_head_stride: tl.int64, v_head_stride: tl.int64,
    TM: tl.constexpr, KB: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    table_row = table_ptr + tl.load(row_ptr + token).to(tl.int64) * table_stride
    # A padding row's position may be stale and lie beyond the table: its first entry alone says that it is one.
    if tl.load(table_row) < 0:
        return
    position = tl.load(position_ptr + token)
    entry = tl.load(table_row + position // TM)
    if entry < 0:
        return

    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_offset = head.to(tl.int64)[:, None]

    k_dim = tl.arange(0, BLOCK_K)[None, :]
    k_inside = (head < HEADS)[:, None] & (k_dim < K_DIM)
    k = tl.load(k_ptr + token * k_stride_t + head_offset * k_stride_h + k_dim, mask=k_inside, other=0.0)
    k_row = row_offset(entry, position, base, manager_stride, kernel_stride, k_token_stride, TM, KB)
    tl.store(pool_ptr + k_row + head_offset * k_head_stride + k_dim, k, mask=k_inside)

    if V_DIM > 0:
        v_dim = tl.arange(0, BLOCK_V)[None, :]
        v_inside = (head < HEADS)[:, None] & (v_dim < V_DIM)
        v = tl.load(v_ptr + token * v_stride_t + head_offset * v_stride_h + v_dim, mask=v_inside, other=0.0)
        v_row = row_offset(entry, position, base, manager_stride, kernel_stride, v_token_stride, TM, KB)
        tl.store(pool_ptr + v_row + kv_stride + head_offset * v_head_stride + v_dim, v, mask=v_inside)


def constants(layout: AttentionLayout) -> dict[str, int]:
    """Compile-time parameters of :func:`kv_store_kernel` for a layout."""
    block_k = power_of_2(layout.k_dim)
    block_v = power_of_2(max(layout.v_dim, 1))
    fits = max(TILE_ELEMENTS // max(block_k, block_v), 1)
    return {
        "TM": layout.tokens_per_entry, "KB": layout.kernel_block_tokens, "HEADS": layout.num_kv_heads,
        "K_DIM": layout.k_dim, "V_DIM": layout.v_dim, "BLOCK_H": min(power_of_2(layout.num_kv_heads), fits),
        "BLOCK_K": block_k, "BLOCK_V": block_v,
    }  # fmt: skip


def kv_store(
    cache: AttentionCache, k_TKD: Tensor, v_TKD: Tensor, kv_table_BN: Tensor, row_T: Tensor, position_T: Tensor
) -> None:
    """See :meth:`.AttentionOperations.kv_store`. ``k_TKD`` and ``v_TKD`` may have any strides but that of
    the last dimension, which is 1."""
    if k_TKD.stride(-1) != 1 or v_TKD.stride(-1) != 1:
        raise ValueError(f"k, v strides {k_TKD.stride()}, {v_TKD.stride()}: the last dimension must be contiguous")
    if k_TKD.shape[0] == 0 or kv_table_BN.shape[1] == 0:
        return
    constant = constants(cache.layout)
    grid = (k_TKD.shape[0], ceil_div(cache.layout.num_kv_heads, constant["BLOCK_H"]))
    launcher(kv_store_kernel)[grid](
        cache.pool, k_TKD, v_TKD, kv_table_BN, row_T, position_T,
        kv_table_BN.stride(0), k_TKD.stride(0), k_TKD.stride(1), v_TKD.stride(0), v_TKD.stride(1),
        **cache.strides, **constant, **OPTIONS,
    )  # fmt: skip
