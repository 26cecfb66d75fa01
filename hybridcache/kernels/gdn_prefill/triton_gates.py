"""GDN prefill's gates: how much each token of a chunk decays the state and how much it writes.

Names as in :mod:`hybridcache.kernels.gdn_prefill.triton`.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

SINCE: tl.constexpr = tl.constexpr(0)
"""Row of a chunk's gates: binary logarithm of the decay from the chunk's start to after the slot's token."""
FROM_START: tl.constexpr = tl.constexpr(1)
"""The decay itself; its last slot's is the whole chunk's."""
TO_END: tl.constexpr = tl.constexpr(2)
"""The decay from after the slot's token to the chunk's end."""
BETA: tl.constexpr = tl.constexpr(3)
"""How much of what the state gets wrong for the token is written."""
ROWS_OF_GATES: tl.constexpr = tl.constexpr(4)


@triton.jit
def softplus(a):
    """``log(1 + exp(a))``, whose small values are right too: a chunk adds 64 of them, and a GPU's fast logarithm errs by
    1e-7 near 1. ``log(1 + y) = 2 atanh(y / (2 + y))``, here with ``y <= 1``, so eight terms do."""
    y = tl.exp(-tl.abs(a))
    s = y / (2.0 + y)
    square = s * s
    series = square / 15.0 + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return tl.maximum(a, 0.0) + 2.0 * s * (series * square + 1.0)


@triton.jit
def store_gates(
    gates_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, slot, valid, head, a_stride, b_stride, V_HEADS: tl.constexpr
):
    """Gates of some heads of one chunk, ``[V_HEADS, ROWS_OF_GATES, slots]`` float32. ``a_ptr`` and ``b_ptr`` point to slot 0
    of head 0; a slot that is not ``valid`` decays and writes nothing."""
    CHUNK: tl.constexpr = slot.shape[0]
    inside = head < V_HEADS
    mask = valid[:, None] & inside[None, :]
    a_log = tl.load(a_log_ptr + head, mask=inside, other=0.0).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + head, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + slot[:, None] * a_stride + head[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + slot[:, None] * b_stride + head[None, :], mask=mask, other=0.0).to(tl.float32)
    decay = tl.where(mask, -tl.exp(a_log)[None, :] * LOG2_E * softplus(a + dt_bias[None, :]), 0.0)
    since = tl.cumsum(decay, 0)
    total = tl.sum(decay, 0)
    beta = tl.where(mask, 1.0 / (1.0 + tl.exp(-b)), 0.0)
    place = gates_ptr + head[None, :] * (ROWS_OF_GATES * CHUNK) + slot[:, None]
    tl.store(place + SINCE * CHUNK, since, mask=inside[None, :])
    tl.store(place + FROM_START * CHUNK, tl.exp2(since), mask=inside[None, :])
    tl.store(place + BETA * CHUNK, beta, mask=inside[None, :])
    tl.store(place + TO_END * CHUNK, tl.exp2(total[None, :] - since), mask=inside[None, :])
