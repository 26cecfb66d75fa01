"""SiLU gating in Triton, of whole rows.

Shapes: A rows, I intermediate (a row holds the gate, then up).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import ceil_div, power_of_2

ROWS_AT_ONCE = 4


@triton.jit(do_not_specialize=["rows"])
def moe_silu_mul_kernel(gate_up_ptr, out_ptr, rows, INNER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_I)
    inside = (row < rows)[:, None] & (i < INNER)[None, :]
    at = gate_up_ptr + row[:, None] * (2 * INNER) + i[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + INNER, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row[:, None] * INNER + i[None, :], out, mask=inside)


def silu_mul(gate_up_AI: Tensor) -> Tensor:
    """See :meth:`.LayerOperations.silu_mul`; rows are contiguous."""
    rows, inner = gate_up_AI.shape[0], gate_up_AI.shape[1] // 2
    out_AI = torch.empty((rows, inner), dtype=gate_up_AI.dtype, device=gate_up_AI.device)
    sizes = {"INNER": inner, "BLOCK_R": ROWS_AT_ONCE, "BLOCK_I": power_of_2(inner)}
    launcher(moe_silu_mul_kernel)[(ceil_div(rows, ROWS_AT_ONCE),)](gate_up_AI, out_AI, rows, **sizes, num_warps=4)
    return out_AI
