"""Paged decode in Triton: split-KV attention of one query per row.

A program takes one row, the query heads of one KV head (up to 64 of them, padded to the 16 rows that the matrix unit
wants) and one split of the row's tokens. With several splits a second launch combines them by their log-sum-exp. The number
of splits comes from shapes alone; lengths stay on the device, so both launches can be captured in a CUDA graph.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcache.dtypes import torch_dtype
from hybridcache.errors import bad
from hybridcache.kernels.addressing import interpreting, row_offset, row_strides
from hybridcache.kernels.memory import elements
from hybridcache.layout import AttentionLayout

LOG2_E = 1.4426950408889634
MAX_HEAD_TILE = 64
"""Query heads of one program at most."""
PROGRAMS_PER_SM = 4
"""Programs that the number of splits aims at, per multiprocessor."""
MIN_SPLIT_TOKENS = 256
"""Tokens below which a split is not worth its reduction."""
MAX_SPLITS = 128
REDUCE_SPLITS = 16
REDUCE_DIMS = 64
"""Tile of the reduction: splits by value dims."""


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["table_ptr", "length_ptr"])
def paged_decode_kernel(
    pool_ptr,
    q_ptr,
    table_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    splits,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    table_stride: tl.int64,
    base: tl.int64,
    manager_stride: tl.int64,
    kernel_stride: tl.int64,
    kv_stride: tl.int64,
    k_token_stride: tl.int64,
    v_token_stride: tl.int64,
    k_head_stride: tl.int64,
    v_head_stride: tl.int64,
    TM: tl.constexpr,
    KB: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
):
    """``out_ptr`` is the output ``[B, H, V_DIM]``, or with ``SPLIT`` the splits' own results ``[B, H, splits, V_DIM]``
    (float32) beside their log2-sum-exp2 ``lse_ptr`` ``[B, H, splits]``, which is -inf for a split without tokens."""
    row = tl.program_id(0).to(tl.int64)
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(1) // HEAD_TILES
    in_group = tl.program_id(1) % HEAD_TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    head_inside = in_group < GROUP
    head = kv_head * GROUP + in_group
    split = tl.program_id(2)

    table_row = table_ptr + row * table_stride
    length = tl.load(length_ptr + row)
    length = tl.where(tl.load(table_row) < 0, 0, length)
    split_tokens = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, length)

    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    k_inside = k_dim < K_DIM
    v_inside = v_dim < V_DIM
    q_offset = row * q_stride_b + head[:, None] * q_stride_h + k_dim[None, :]
    q = tl.load(q_ptr + q_offset, mask=head_inside[:, None] & k_inside[None, :], other=0.0).to(DOT)

    k_base = base + kv_head.to(tl.int64) * k_head_stride
    v_base = base + kv_stride + kv_head.to(tl.int64) * v_head_stride
    highest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V], dtype=tl.float32)

    # The entries of a tile are read one tile ahead: a load inside the loop that another load's address needs would take a
    # stage of the software pipeline from K and V.
    position = start + tl.arange(0, BLOCK_N)
    entry = tl.load(table_row + position // TM, mask=position < end, other=-1)
    for _ in range(start, end, BLOCK_N):
        inside = entry >= 0
        k_row = row_offset(entry, position, k_base, manager_stride, kernel_stride, k_token_stride, TM, KB)
        v_row = row_offset(entry, position, v_base, manager_stride, kernel_stride, v_token_stride, TM, KB)
        position += BLOCK_N
        entry = tl.load(table_row + position // TM, mask=position < end, other=-1)

        k_mask = k_inside[:, None] & inside[None, :]
        k = tl.load(pool_ptr + k_row[None, :] + k_dim[:, None], mask=k_mask, other=0.0).to(DOT)
        score = tl.dot(q, k, input_precision="ieee") * scale_log2
        score = tl.where(inside[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        # A tile without one valid entry leaves the maximum at -inf; subtracting that from itself would make NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(p, 1)
        highest = new_highest

        v_mask = inside[:, None] & v_inside[None, :]
        v = tl.load(pool_ptr + v_row[:, None] + v_dim[None, :], mask=v_mask, other=0.0).to(DOT)
        acc = tl.dot(p.to(DOT), v, acc * rescale[:, None], input_precision="ieee")

    # The highest score adds 1 to the total, so 1 changes nothing but the 0 of no tokens at all.
    total = tl.maximum(total, 1.0)
    out = acc / total[:, None]
    out_mask = head_inside[:, None] & v_inside[None, :]
    out_row = row * (KV_HEADS * GROUP) + head
    if SPLIT:
        out_row = out_row * splits + split
        tl.store(lse_ptr + out_row, highest + tl.log2(total), mask=head_inside)
        out_mask = out_mask & (start < end)
    tl.store(out_ptr + out_row[:, None] * V_DIM + v_dim[None, :], out, mask=out_mask)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    splits,
    V_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum of the splits' results of one head, weighted by their shares of the softmax; 0 where no split has tokens."""
    row = tl.program_id(0).to(tl.int64)
    v_dim = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_inside = v_dim < V_DIM
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_V], dtype=tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
        filled = lse > float("-inf")
        # What an empty split's part holds was never written.
        part = part_ptr + (row * splits + split)[:, None] * V_DIM + v_dim[None, :]
        part = tl.load(part, mask=filled[:, None] & v_inside[None, :], other=0.0)
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        rescale = tl.exp2(highest - shift)
        share = tl.exp2(lse - shift)
        total = total * rescale + tl.sum(share, 0)
        acc = acc * rescale + tl.sum(share[:, None] * part, 0)
        highest = new_highest
    out = acc / tl.maximum(total, 1.0)
    tl.store(out_ptr + row * V_DIM + v_dim, out, mask=v_inside)


def constants(layout: AttentionLayout, num_heads: int, dtype: torch.dtype, *, split: bool) -> dict[str, Any]:
    """Compile-time parameters of :func:`paged_decode_kernel` for a layout, query heads and their dtype."""
    group = num_heads // layout.num_kv_heads
    block_k = max(triton.next_power_of_2(layout.k_dim), 16)
    block_v = max(triton.next_power_of_2(layout.v_dim), 16)
    row_bytes = max(block_k, block_v) * dtype.itemsize
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "TM": layout.tokens_per_entry,
        "KB": layout.kernel_block_tokens,
        "KV_HEADS": layout.num_kv_heads,
        "GROUP": group,
        "K_DIM": layout.k_dim,
        "V_DIM": layout.v_dim,
        "BLOCK_H": min(max(triton.next_power_of_2(group), 16), MAX_HEAD_TILE),
        "BLOCK_N": min(max(16 * 1024 // row_bytes, 16), 64),
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "SPLIT": split,
        # The interpreter's bfloat16 dot is wrong (Triton 3.6, 3.7).
        "DOT": tl.float32 if interpreting() else dot,
    }


def combine_constants(v_dim: int) -> dict[str, int]:
    """Compile-time parameters of :func:`combine_kernel`."""
    return {
        "V_DIM": v_dim,
        "BLOCK_S": REDUCE_SPLITS,
        "BLOCK_V": min(triton.next_power_of_2(v_dim), REDUCE_DIMS),
    }


def options() -> dict[str, Any]:
    """Launch options of :func:`paged_decode_kernel`."""
    return {"num_warps": 4, "num_stages": 3}


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs: int, max_tokens: int, multiprocessors: int) -> int:
    """Splits of each row's tokens.

    Args:
        programs: programs of one split (rows x KV heads x tiles of query heads).
        max_tokens: tokens that a row's table can hold.
        multiprocessors: of the device.
    """
    wanted = triton.cdiv(PROGRAMS_PER_SM * multiprocessors, programs)
    return max(1, min(wanted, triton.cdiv(max_tokens, MIN_SPLIT_TOKENS), MAX_SPLITS))


def paged_decode(
    buffer: torch.Tensor,
    layout: AttentionLayout,
    layer: int,
    q_BHD: torch.Tensor,
    kv_table_BN: torch.Tensor,
    context_len_B: torch.Tensor,
    scale: float,
    *,
    num_splits: int | None = None,
) -> torch.Tensor:
    """See :meth:`hybridcache.kernels.backend.Backend.paged_decode`. Padding rows of the output are 0.

    Args:
        num_splits: :func:`choose_splits` decides where None.

    Raises:
        UserError: float64 queries, or a latent KV (``v_dim=0``).
    """
    if q_BHD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise bad("dtype", str(q_BHD.dtype), "Triton decodes in bfloat16, float16 or float32; choose the torch backend")
    if layout.v_dim == 0:
        raise bad("v_dim", 0, "latent KV (MLA) has no Triton decode kernel; choose the torch backend")
    if q_BHD.stride(-1) != 1:
        raise ValueError(f"q strides {q_BHD.stride()}: the last dimension must be contiguous")
    rows, num_heads, _ = q_BHD.shape
    out_BHD = torch.empty((rows, num_heads, layout.v_dim), dtype=q_BHD.dtype, device=q_BHD.device)
    if rows == 0 or kv_table_BN.shape[1] == 0:
        return out_BHD.zero_()

    group = num_heads // layout.num_kv_heads
    head_programs = layout.num_kv_heads * triton.cdiv(group, MAX_HEAD_TILE)
    max_tokens = kv_table_BN.shape[1] * layout.tokens_per_entry
    splits = num_splits or choose_splits(rows * head_programs, max_tokens, _multiprocessors(q_BHD.device))
    part, lse = out_BHD, out_BHD
    if splits > 1:
        part = torch.empty((rows, num_heads, splits, layout.v_dim), dtype=torch.float32, device=q_BHD.device)
        lse = torch.empty((rows, num_heads, splits), dtype=torch.float32, device=q_BHD.device)
    paged_decode_kernel[(rows, head_programs, splits)](
        elements(buffer, torch_dtype(layout.dtype)),
        q_BHD,
        kv_table_BN,
        context_len_B,
        part,
        lse,
        scale * LOG2_E,
        splits,
        q_BHD.stride(0),
        q_BHD.stride(1),
        kv_table_BN.stride(0),
        **row_strides(layout, layer),
        **constants(layout, num_heads, q_BHD.dtype, split=splits > 1),
        **options(),
    )
    if splits > 1:
        constant = combine_constants(layout.v_dim)
        grid = (rows * num_heads, triton.cdiv(layout.v_dim, constant["BLOCK_V"]))
        combine_kernel[grid](part, lse, out_BHD, splits, **constant, num_warps=1)
    return out_BHD
