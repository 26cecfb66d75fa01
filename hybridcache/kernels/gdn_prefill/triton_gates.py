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
WRITTEN_FROM_START: tl.constexpr = tl.constexpr(2)
"""The decay times beta: what part of the value that the state at the chunk's start holds for the token's key it loses."""
TO_END: tl.constexpr = tl.constexpr(3)
"""The decay from after the slot's token to the chunk's end."""
BETA: tl.constexpr = tl.constexpr(4)
ROWS_OF_GATES: tl.constexpr = tl.constexpr(5)


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
def store_gates(gates_ptr, a_ptr, b_ptr, a_log, dt_bias, slot, valid, a_stride, b_stride):
    """Gates of one head of one chunk, ``[ROWS_OF_GATES, slots]`` float32. ``a_ptr`` and ``b_ptr`` point to slot 0; a slot
    that is not ``valid`` decays and writes nothing. Returns beta."""
    CHUNK: tl.constexpr = slot.shape[0]
    a = tl.load(a_ptr + slot * a_stride, mask=valid, other=0.0).to(tl.float32) + dt_bias
    b = tl.load(b_ptr + slot * b_stride, mask=valid, other=0.0).to(tl.float32)
    decay = tl.where(valid, -tl.exp(a_log) * LOG2_E * softplus(a), 0.0)
    since = tl.cumsum(decay, 0)
    total = tl.sum(decay, 0)
    tl.store(gates_ptr + SINCE * CHUNK + slot, since)
    beta = tl.where(valid, 1.0 / (1.0 + tl.exp(-b)), 0.0)
    from_start = tl.exp2(since)
    tl.store(gates_ptr + BETA * CHUNK + slot, beta)
    tl.store(gates_ptr + FROM_START * CHUNK + slot, from_start)
    tl.store(gates_ptr + WRITTEN_FROM_START * CHUNK + slot, beta * from_start)
    tl.store(gates_ptr + TO_END * CHUNK + slot, tl.exp2(total - since))
    return beta
