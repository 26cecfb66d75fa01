"""What layers compute between projections, the greedy choice of tokens, and block copies, in PyTorch: the reference of every
fused kernel, and the implementation wherever Triton does not run.

Contracts and shapes: :class:`~hybridcache.kernels.operations.LayerOperations`, whose methods these are. Norms compute in at
least float32. A = T * k assignments of tokens to experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridcache.kernels.greedy import NOT_FINITE


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if delta_TD is not None:
        x_TD = x_TD + delta_TD
    return x_TD, F.rms_norm(x_TD.to(weight_D.dtype), weight_D.shape, 1.0 + weight_D, eps).to(x_TD.dtype)


def gated_norm(x_THE: Tensor, gate_THE: Tensor, weight_E: Tensor, eps: float, out_THE: Tensor) -> None:
    normed = F.rms_norm(x_THE.to(weight_E.dtype), weight_E.shape, weight_E, eps)
    out_THE.copy_(normed * F.silu(gate_THE.to(weight_E.dtype)))


def sigmoid_mul(x_THE: Tensor, gate_THE: Tensor, out_THE: Tensor) -> None:
    torch.mul(x_THE, gate_THE.sigmoid(), out=out_THE)


def route(logits_TR: Tensor, experts: int, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    logits_TR = logits_TR.to(torch.float64 if logits_TR.dtype == torch.float64 else torch.float32)
    weight_Tk, expert_Tk = logits_TR[:, :experts].softmax(-1).topk(k, dim=-1)
    if renormalise:
        weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
    shared_T1 = logits_TR[:, experts : experts + 1].sigmoid()
    return torch.cat([weight_Tk, shared_T1], dim=1), expert_Tk.int()


def silu_mul(gate_up_AI: Tensor) -> Tensor:
    gate, up = gate_up_AI.chunk(2, dim=1)
    return F.silu(gate) * up


def mixture(
    x_TD: Tensor, weight_Ts: Tensor, expert_Tk: Tensor, gate_up_EID: Tensor, down_EDI: Tensor,
    shared_gate_up_JD: Tensor, shared_down_DJ: Tensor,
) -> Tensor:  # fmt: skip
    """Experts that were hit are done one by one, their number and sizes read by the host."""
    tokens, k = expert_Tk.shape
    expert_A, order_A = expert_Tk.flatten().sort(stable=True)
    x_AD = x_TD[order_A // k]
    weight_A1 = weight_Ts[:, :k].flatten()[order_A].unsqueeze(1).to(x_TD.dtype)
    y_AD = torch.empty_like(x_AD)
    hit, counts = expert_A.unique_consecutive(return_counts=True)
    begin = 0
    for expert, count in zip(hit.tolist(), counts.tolist()):
        rows = slice(begin, begin + count)
        # The routing weight is applied to the narrow side; the product with `down` is linear in it.
        narrow = silu_mul(F.linear(x_AD[rows], gate_up_EID[expert])) * weight_A1[rows]
        y_AD[rows] = F.linear(narrow, down_EDI[expert])
        begin += count
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(tokens * k, device=order_A.device)
    routed_TD = y_AD[place_A].unflatten(0, (tokens, k)).sum(1)
    shared_TD = F.linear(silu_mul(F.linear(x_TD, shared_gate_up_JD)), shared_down_DJ)
    return routed_TD + weight_Ts[:, k:].to(x_TD.dtype) * shared_TD


def greedy(logits_RV: Tensor, sampled_R: Tensor, feed_R: Tensor) -> None:
    best = logits_RV.max(dim=-1)
    # Infinity less itself and NaN are not 0. (torch.where would copy its scalar to the device, and wait.)
    sampled_R.copy_(best.indices.masked_fill_(best.values - best.values != 0, NOT_FINITE))
    torch.clamp_min(sampled_R, 0, out=feed_R)


def block_copy(buffer: Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
    for src, dst, num_bytes in moves:
        buffer[dst : dst + num_bytes].copy_(buffer[src : src + num_bytes])
    return sum(num_bytes for _, _, num_bytes in moves)
