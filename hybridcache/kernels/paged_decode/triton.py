"""Paged decode in Triton: split-KV attention of one query per row.

A program takes one row, the query heads of one KV head (up to 64 of them, padded to the 16 rows that the matrix unit
wants) and one split of the row's tokens. It masks nothing but the split's last tile. With several splits a second launch
combines them by their log-sum-exp, always in one order; on Hopper it is set up while the first still runs (programmatic
dependent launch). The number of splits comes from shapes and the device alone; lengths stay on the device, so both launches
can be captured in a CUDA graph. Programs of one row's KV heads are neighbours in launch order: heads that lie side by side
in the pool are read at about the same time.

Shapes: B rows, H query heads, D value dim, S splits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.paged_decode.tiles import (
    Tiles,
    check_queries,
    choose_splits,
    choose_tiles,
    head_programs,
    head_tile,
    processors,
)
from hybridcache.kernels.paged_prefill.triton import attend, table_entries
from hybridcache.kernels.pool_rows import interpreting
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import AttentionLayout

LOG2_E = 1.4426950408889634
COMBINE_DIMS = 64
"""Value dims of one program of the reduction."""


@triton.jit(do_not_specialize=["splits", "table_stride"], do_not_specialize_on_alignment=["table_ptr", "length_ptr"])
def paged_decode_kernel(
    pool_ptr, q_ptr, table_ptr, length_ptr, out_ptr, lse_ptr, scale_log2, splits,
    q_stride_b: tl.int64, q_stride_h: tl.int64, table_stride: tl.int64, base: tl.int64, manager_stride: tl.int32,
    kernel_stride: tl.int32, kv_stride: tl.int64, k_token_stride: tl.int32, v_token_stride: tl.int32,
    k_head_stride: tl.int64, v_head_stride: tl.int64,
    TM: tl.constexpr, KB: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, K_DIM: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SAME_ROWS: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Grid: (rows x KV heads x tiles of a group's heads, splits).

    ``out_ptr`` is the output ``[B, H, V_DIM]``, or with ``SPLIT`` the splits' own results ``[B, H, splits, V_DIM]``
    (float32) beside their log2-sum-exp2 ``lse_ptr`` ``[B, H, splits]``, which is -inf for a split without tokens."""
    if SPLIT and DEPENDENT_LAUNCH:
        tl.extra.cuda.gdc_launch_dependents()
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    row = (tl.program_id(0) // (KV_HEADS * HEAD_TILES)).to(tl.int64)
    program = tl.program_id(0) % (KV_HEADS * HEAD_TILES)
    kv_head = program // HEAD_TILES
    in_group = program % HEAD_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = in_group < GROUP
    head = kv_head * GROUP + in_group
    split = tl.program_id(1)

    table_row = table_ptr + row * table_stride
    length = tl.load(length_ptr + row)
    length = tl.where(tl.load(table_row) < 0, 0, length).to(tl.int32)
    split_tokens = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start = tl.minimum(split * split_tokens, length)
    end = tl.minimum(start + split_tokens, length)
    unmasked = start + (end - start) // BLOCK_N * BLOCK_N

    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    q_offset = row * q_stride_b + head[:, None] * q_stride_h + k_dim[None, :]
    q_mask = head_inside[:, None] & (k_dim < K_DIM)[None, :]
    q = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0).to(DOT)
    k_ptr = pool_ptr + (base + kv_head * k_head_stride)
    v_ptr = pool_ptr + (base + kv_stride + kv_head * v_head_stride)
    limit = tl.zeros([BLOCK_H], dtype=tl.int32) + end
    highest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V], dtype=tl.float32)
    entry = table_entries(table_row, start, tl.maximum(end - 1, 0), TM, BLOCK_N)
    # fmt: off
    acc, highest, total, entry = attend(
        acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, start, unmasked, end, limit,
        manager_stride, kernel_stride, k_token_stride, v_token_stride,
        TM, KB, K_DIM, V_DIM, BLOCK_N, BLOCK_K, BLOCK_V, SAME_ROWS, DOT, STAGES, False,
    )
    acc, highest, total, entry = attend(
        acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, unmasked, end, end, limit,
        manager_stride, kernel_stride, k_token_stride, v_token_stride,
        TM, KB, K_DIM, V_DIM, BLOCK_N, BLOCK_K, BLOCK_V, SAME_ROWS, DOT, 1, True,
    )
    # fmt: on

    # Only a split without tokens has a total of 0.
    total = tl.where(total > 0, total, 1.0)
    out = acc / total[:, None]
    out_row = row * (KV_HEADS * GROUP) + head
    out_mask = head_inside[:, None] & (v_dim < V_DIM)[None, :]
    if SPLIT:
        out_row = out_row * splits + split
        tl.store(lse_ptr + out_row, highest * scale_log2 + tl.log2(total), mask=head_inside)
        out_mask = out_mask & (start < end)
    tl.store(out_ptr + out_row[:, None] * V_DIM + v_dim[None, :], out, mask=out_mask)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, splits,
    V_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr,
):  # fmt: skip
    """Sum of the splits' results of one head, weighted by their shares of the softmax; 0 where no split has tokens."""
    if DEPENDENT_LAUNCH:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    v_dim = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_inside = v_dim < V_DIM
    split = tl.arange(0, BLOCK_S)
    inside = split < splits
    lse = tl.load(lse_ptr + row * splits + split, mask=inside, other=float("-inf"))
    part = part_ptr + (row * splits + split)[:, None] * V_DIM + v_dim[None, :]
    part = tl.load(part, mask=inside[:, None] & v_inside[None, :], other=0.0)
    # What an empty split's part holds was never written. It is loaded all the same: so no load waits for another.
    part = tl.where((lse > float("-inf"))[:, None], part, 0.0)
    highest = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share, 0)
    out = tl.sum(share[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * V_DIM + v_dim, out, mask=v_inside)


def constants(
    layout: AttentionLayout, num_heads: int, dtype: torch.dtype, tiles: Tiles, *, split: bool, dependent: bool = True
) -> dict[str, Any]:
    """Compile-time parameters of :func:`paged_decode_kernel` for a layout, query heads, their dtype and tiles.
    ``dependent``: whether the device has dependent launches."""
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "TM": layout.tokens_per_entry, "KB": layout.kernel_block_tokens, "KV_HEADS": layout.num_kv_heads,
        "GROUP": num_heads // layout.num_kv_heads, "K_DIM": layout.k_dim, "V_DIM": layout.v_dim,
        "BLOCK_H": head_tile(layout, num_heads, dtype), "BLOCK_N": tiles.keys,
        "BLOCK_K": max(power_of_2(layout.k_dim), 16), "BLOCK_V": max(power_of_2(layout.v_dim), 16),
        # Two sets of addresses for float32, whose products then keep within the registers.
        "SAME_ROWS": dtype.itemsize < 4 and layout.token_stride[0] == layout.token_stride[1], "SPLIT": split,
        # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
        "DOT": tl.float32 if interpreting() else dot, "STAGES": tiles.num_stages,
        "DEPENDENT_LAUNCH": tiles.dependent_launch and dependent,
    }  # fmt: skip


def combine_constants(v_dim: int, splits: int, dependent: bool) -> dict[str, Any]:
    """Compile-time parameters of :func:`combine_kernel`."""
    return {
        "V_DIM": v_dim,
        "BLOCK_S": power_of_2(splits),
        "BLOCK_V": min(power_of_2(v_dim), COMBINE_DIMS),
        "DEPENDENT_LAUNCH": dependent,
    }


def combine_options(dependent: bool) -> dict[str, Any]:
    """Launch options of :func:`combine_kernel`."""
    return {"num_warps": 4} | ({"launch_pdl": True} if dependent else {})


def paged_decode(
    cache: AttentionCache, q_BHD: Tensor, kv_table_BN: Tensor, context_len_B: Tensor, scale: float, *,
    num_splits: int | None = None, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`.AttentionOperations.paged_decode`. Padding rows of the output are 0.

    Args:
        num_splits: :func:`choose_splits` decides where None.
        tiles: :func:`choose_tiles` decides where None.

    Raises:
        UserError, ValueError: see :func:`~hybridcache.kernels.paged_decode.tiles.check_queries`.
    """
    layout = cache.layout
    check_queries(layout, q_BHD, scale)
    rows, num_heads, _ = q_BHD.shape
    out_BHD = torch.empty((rows, num_heads, layout.v_dim), dtype=q_BHD.dtype, device=q_BHD.device)
    if rows == 0 or kv_table_BN.shape[1] == 0:
        return out_BHD.zero_()

    device = processors(q_BHD.device)
    programs = rows * head_programs(layout, num_heads, q_BHD.dtype)
    tiles = tiles or choose_tiles(layout, num_heads, q_BHD.dtype, programs, device.count)
    max_tokens = kv_table_BN.shape[1] * layout.tokens_per_entry
    splits = num_splits or choose_splits(programs, max_tokens, device.count, tiles)
    part, lse = out_BHD, out_BHD
    if splits > 1:
        part = torch.empty((rows, num_heads, splits, layout.v_dim), dtype=torch.float32, device=q_BHD.device)
        lse = torch.empty((rows, num_heads, splits), dtype=torch.float32, device=q_BHD.device)
    constant = constants(layout, num_heads, q_BHD.dtype, tiles, split=splits > 1, dependent=device.dependent_launch)
    launcher(paged_decode_kernel)[(programs, splits)](
        cache.pool, q_BHD, kv_table_BN, context_len_B, part, lse, scale * LOG2_E, splits,
        q_BHD.stride(0), q_BHD.stride(1), kv_table_BN.stride(0),
        **cache.strides, **constant, num_warps=tiles.num_warps,
    )  # fmt: skip
    if splits > 1:
        combine(part, lse, out_BHD, dependent=constant["DEPENDENT_LAUNCH"])
    return out_BHD


def combine(part_BHSD: Tensor, lse_BHS: Tensor, out_BHD: Tensor, *, dependent: bool = False) -> None:
    """One launch of :func:`combine_kernel` on the results of S splits. ``dependent``: as a dependent launch, behind a kernel
    that allows it."""
    rows, num_heads, splits, v_dim = part_BHSD.shape
    constant = combine_constants(v_dim, splits, dependent)
    grid = (rows * num_heads, ceil_div(v_dim, constant["BLOCK_V"]))
    launcher(combine_kernel)[grid](part_BHSD, lse_BHS, out_BHD, splits, **constant, **combine_options(dependent))
