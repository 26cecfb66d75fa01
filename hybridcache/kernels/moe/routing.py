"""Routing in Triton: softmax, top-k, renormalisation and the shared expert's gate in one launch.

Shapes: T tokens, E experts, R router rows, k experts per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import power_of_2


@triton.jit
def moe_route_kernel(
    logits_ptr, weight_ptr, expert_ptr,
    logits_stride,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * logits_stride
    e = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + e, mask=e < EXPERTS, other=float("-inf")).to(tl.float32)
    highest = tl.max(logits, 0)
    total = tl.sum(tl.exp(logits - highest), 0)
    chosen = tl.zeros([BLOCK_K], dtype=tl.int32)
    value = tl.full([BLOCK_K], float("-inf"), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        best, index = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
        # Where logits are NaN any index may come out; it must name an expert.
        chosen = tl.where(slot == k, tl.minimum(index, EXPERTS - 1), chosen)
        value = tl.where(slot == k, best, value)
        logits = tl.where(e == index, float("-inf"), logits)
    weight = tl.exp(value - highest)
    weight = weight / (tl.sum(weight, 0) if RENORMALISE else total)
    gate = tl.load(logits_ptr + EXPERTS).to(tl.float32)
    weight = tl.where(slot == TOP_K, 1.0 / (1.0 + tl.exp(-gate)), weight)
    tl.store(weight_ptr + token * (TOP_K + 1) + slot, weight, mask=slot <= TOP_K)
    tl.store(expert_ptr + token * TOP_K + slot, chosen, mask=slot < TOP_K)


def route(logits_TR: Tensor, experts: int, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """See :meth:`.LayerOperations.route`. Weights are float32; of equal logits the first expert is chosen."""
    tokens = logits_TR.shape[0]
    weight_Ts = torch.empty((tokens, k + 1), dtype=torch.float32, device=logits_TR.device)
    expert_Tk = torch.empty((tokens, k), dtype=torch.int32, device=logits_TR.device)
    if tokens:
        launcher(moe_route_kernel)[(tokens,)](
            logits_TR, weight_Ts, expert_Tk,
            logits_TR.stride(0),
            EXPERTS=experts, TOP_K=k, RENORMALISE=renormalise, BLOCK_E=power_of_2(experts), BLOCK_K=power_of_2(k + 1),
            num_warps=1,
        )  # fmt: skip
    return weight_Ts, expert_Tk
