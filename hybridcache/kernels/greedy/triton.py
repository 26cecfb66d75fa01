"""Greedy choice in Triton: each program finds the best token of a part of one row's vocabulary, a second launch the best of
those.

Shapes: R rows, V vocabulary, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.greedy import NOT_FINITE
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import power_of_2

PART = 4096
"""Tokens of one part."""


@triton.jit
def sample_part_kernel(logits_ptr, value_ptr, index_ptr, stride, vocabulary, BLOCK: tl.constexpr):
    """Best value and token of a part; where it holds NaN, +inf is its best value: no row of finite logits has that."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), logits)
    value, index = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + part
    tl.store(value_ptr + at, value)
    tl.store(index_ptr + at, part * BLOCK + index)


@triton.jit
def sample_best_kernel(value_ptr, index_ptr, id_ptr, feed_ptr, parts, NONE: tl.constexpr, BLOCK: tl.constexpr):
    """The best part's token of one row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    value = tl.load(value_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    best, first = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(index_ptr + row * parts + first).to(tl.int64)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(id_ptr + row, tl.where(finite, token, NONE))
    tl.store(feed_ptr + row, tl.where(finite, token, 0))


def greedy(logits_RV: Tensor, ids_R: Tensor, feed_R: Tensor) -> None:
    """See :meth:`.LayerOperations.greedy`. Not for float64."""
    rows, vocabulary = logits_RV.shape
    if rows == 0:
        return
    parts = -(-vocabulary // PART)
    value = torch.empty((rows, parts), dtype=torch.float32, device=logits_RV.device)
    index = torch.empty((rows, parts), dtype=torch.int32, device=logits_RV.device)
    launcher(sample_part_kernel)[(rows, parts)](
        logits_RV, value, index, logits_RV.stride(0), vocabulary, BLOCK=PART, num_warps=4
    )
    block = power_of_2(parts)
    launcher(sample_best_kernel)[(rows,)](value, index, ids_R, feed_R, parts, NONE=NOT_FINITE, BLOCK=block, num_warps=1)
