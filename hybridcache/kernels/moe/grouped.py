"""Experts of many tokens: PyTorch's grouped products, with what stands between them in Triton.

Assignments are sorted by expert, so that each expert's rows are contiguous; nothing of that is known to the host.

Shapes: T tokens, D hidden, E experts, k experts per token, A = T * k assignments, I intermediate.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import power_of_2

ROWS_AT_ONCE = 4


@triton.jit
def moe_gather_kernel(
    x_ptr, order_ptr, out_ptr, place_ptr, x_stride, TOP_K: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Row ``a`` of ``out`` is the token of assignment ``order[a]``; ``place`` is the inverse of ``order``."""
    row = tl.program_id(0).to(tl.int64)
    assignment = tl.load(order_ptr + row)
    tl.store(place_ptr + assignment, row.to(tl.int32))
    x_ptr += assignment // TOP_K * x_stride
    out_ptr += row * DIM
    for first in tl.range(0, DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tl.store(out_ptr + d, tl.load(x_ptr + d, mask=d < DIM), mask=d < DIM)


@triton.jit(do_not_specialize=["rows"])
def moe_silu_mul_kernel(
    gate_up_ptr,
    weight_ptr,
    order_ptr,
    out_ptr,
    rows,
    TOP_K: tl.constexpr,
    INNER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """``silu(gate) * up``, times the weight of the row's assignment."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.arange(0, BLOCK_I)
    inside = (row < rows)[:, None] & (i < INNER)[None, :]
    at = gate_up_ptr + row[:, None] * (2 * INNER) + i[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + INNER, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        assignment = tl.load(order_ptr + row, mask=row < rows, other=0)
        slot = assignment // TOP_K * (TOP_K + 1) + assignment % TOP_K
        out *= tl.load(weight_ptr + slot, mask=row < rows, other=0.0)[:, None]
    tl.store(out_ptr + row[:, None] * INNER + i[None, :], out, mask=inside)


@triton.jit
def moe_combine_kernel(
    y_ptr, place_ptr, shared_ptr, weight_ptr, out_ptr, TOP_K: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of a token's rows, in the order of its experts, and its gated shared expert."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < DIM
    gate = tl.load(weight_ptr + token * (TOP_K + 1) + TOP_K)
    acc = tl.load(shared_ptr + token * DIM + d, mask=inside, other=0.0).to(tl.float32) * gate
    for slot in tl.static_range(TOP_K):
        row = tl.load(place_ptr + token * TOP_K + slot).to(tl.int64)
        acc += tl.load(y_ptr + row * DIM + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * DIM + d, acc, mask=inside)


def gather(x_TD: torch.Tensor, order_A: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x in the order of assignments, and each assignment's place in that order (int32)."""
    assignments, dim = order_A.shape[0], x_TD.shape[1]
    out_AD = torch.empty((assignments, dim), dtype=x_TD.dtype, device=x_TD.device)
    place_A = torch.empty(assignments, dtype=torch.int32, device=x_TD.device)
    block = min(power_of_2(dim), 2048)
    launcher(moe_gather_kernel)[(assignments,)](
        x_TD, order_A, out_AD, place_A, x_TD.stride(0), TOP_K=k, DIM=dim, BLOCK_D=block, num_warps=4
    )
    return out_AD, place_A


def silu_mul(
    gate_up_AI: torch.Tensor, weight_Ts: torch.Tensor | None = None, order_A: torch.Tensor | None = None
) -> torch.Tensor:
    """``silu(gate) * up`` of contiguous rows; with ``weight_Ts`` times the weight of assignment ``order_A`` of each row."""
    rows, inner = gate_up_AI.shape[0], gate_up_AI.shape[1] // 2
    out_AI = torch.empty((rows, inner), dtype=gate_up_AI.dtype, device=gate_up_AI.device)
    weighted = weight_Ts is not None
    launcher(moe_silu_mul_kernel)[(-(-rows // ROWS_AT_ONCE),)](
        gate_up_AI,
        weight_Ts if weighted else gate_up_AI,
        order_A if weighted else gate_up_AI,
        out_AI,
        rows,
        TOP_K=weight_Ts.shape[1] - 1 if weight_Ts is not None else 1,
        INNER=inner,
        WEIGHTED=weighted,
        BLOCK_R=ROWS_AT_ONCE,
        BLOCK_I=power_of_2(inner),
        num_warps=4,
    )
    return out_AI


def combine(
    y_AD: torch.Tensor, place_A: torch.Tensor, shared_TD: torch.Tensor, weight_Ts: torch.Tensor
) -> torch.Tensor:
    """Sum of each token's rows of ``y_AD`` and of its shared expert, times that one's weight."""
    tokens, dim = shared_TD.shape
    out_TD = torch.empty_like(shared_TD)
    block = min(power_of_2(dim), 1024)
    launcher(moe_combine_kernel)[(tokens, -(-dim // block))](
        y_AD,
        place_A,
        shared_TD,
        weight_Ts,
        out_TD,
        TOP_K=weight_Ts.shape[1] - 1,
        DIM=dim,
        BLOCK_D=block,
        num_warps=4,
    )
    return out_TD


def mixture(
    x_TD: torch.Tensor,
    weight_Ts: torch.Tensor,
    expert_Tk: torch.Tensor,
    gate_up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    shared_gate_up_JD: torch.Tensor,
    shared_down_DJ: torch.Tensor,
) -> torch.Tensor:
    """See :meth:`.LayerOperations.mixture`; bfloat16 on CUDA. Weights are float32."""
    experts, k = gate_up_EID.shape[0], expert_Tk.shape[1]
    # 16-bit keys: a radix sort takes a quarter of the passes.
    key = torch.int16 if experts < 1 << 15 else torch.int32
    expert_A, order_A = expert_Tk.flatten().to(key).sort(stable=True)
    every = torch.arange(experts, dtype=key, device=x_TD.device)
    ends_E = torch.searchsorted(expert_A, every, right=True, out_int32=True)
    x_AD, place_A = gather(x_TD, order_A, k)
    # The routing weight is applied to the narrow side; the product with `down` is linear in it.
    narrow_AI = silu_mul(F.grouped_mm(x_AD, gate_up_EID.mT, offs=ends_E), weight_Ts, order_A)
    y_AD = F.grouped_mm(narrow_AI, down_EDI.mT, offs=ends_E)
    shared_TD = F.linear(silu_mul(F.linear(x_TD, shared_gate_up_JD)), shared_down_DJ)
    return combine(y_AD, place_A, shared_TD, weight_Ts)
