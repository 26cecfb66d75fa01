"""GDN prefill's launch over chunks: gates, and the two matrices of a chunk that no state enters.

Names as in :mod:`hybridcache.kernels.gdn_prefill.triton`.
"""

import triton
import triton.language as tl


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
def inverse_unit_lower(system, LEVELS: tl.constexpr, SOLVE: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + system)^-1`` of a strictly lower triangular float32 matrix of size ``2 ** LEVELS``.

    Starting from diagonal blocks of one, blocks double: ``[[A, 0], [C, B]]`` has the inverse ``[[A', 0], [-B' C A', B']]``.
    Each step does all blocks of its size at once: with D' the block diagonal of inverses so far and L the corners C, the
    next is ``D' - D' L D'``.
    """
    N: tl.constexpr = system.shape[0]
    at = tl.arange(0, N)
    inverse = tl.where(at[:, None] == at[None, :], 1.0, 0.0)
    inverse -= tl.where((at[:, None] ^ at[None, :]) == 1, system, 0.0)
    for level in tl.range(1, LEVELS):
        block = at >> level
        corner = tl.where((block[:, None] ^ block[None, :]) == 1, system, 0.0).to(SOLVE)
        half = tl.dot(corner, inverse.to(SOLVE), input_precision=PRECISION)
        inverse -= tl.dot(inverse.to(SOLVE), half.to(SOLVE), input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize_on_alignment=["index_ptr", "cu_ptr", "start_ptr", "a_ptr", "b_ptr"])
def chunk_kernel(
    solve_ptr,
    score_ptr,
    from_start_ptr,
    to_end_ptr,
    key_desc,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    index_ptr,
    cu_ptr,
    start_ptr,
    a_stride: tl.int64,
    b_stride: tl.int64,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEY_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    DOT: tl.constexpr,
    SOLVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program does one value head of one chunk. Slots without a token get a key of 0 and beta 0, so that their rows and
    columns are those of the unit matrix before the last factor, and 0 after it."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    row = tl.load(index_ptr + 2 * chunk)
    if row < 0:
        return
    number = tl.load(index_ptr + 2 * chunk + 1)
    begin = tl.load(cu_ptr + row).to(tl.int32)
    end = tl.load(cu_ptr + row + 1).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    slot = tl.arange(0, CHUNK)
    token = begin - start % CHUNK + number * CHUNK + slot
    valid = (token >= begin) & (token < end)
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    channel = (head // GROUP) * BLOCK_K
    a = tl.load(a_ptr + token * a_stride + head, mask=valid, other=0.0).to(tl.float32)
    a += tl.load(dt_bias_ptr + head).to(tl.float32)
    b = tl.load(b_ptr + token * b_stride + head, mask=valid, other=0.0).to(tl.float32)
    log_decay = tl.where(valid, -tl.exp(tl.load(a_log_ptr + head).to(tl.float32)) * softplus(a), 0.0)
    beta = tl.where(valid, 1.0 / (1.0 + tl.exp(-b)), 0.0)
    since = tl.cumsum(log_decay, 0)
    total = tl.sum(log_decay, 0)
    rank = chunk.to(tl.int64) * V_HEADS + head
    tl.store(from_start_ptr + rank * CHUNK + slot, tl.exp(since))
    tl.store(to_end_ptr + rank * CHUNK + slot, tl.exp(total - since))

    square = slot[:, None] * CHUNK + slot[None, :]
    causal = slot[:, None] >= slot[None, :]
    between = tl.exp(tl.where(causal, since[:, None] - since[None, :], -float("inf")))
    score = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in tl.static_range(0, BLOCK_K, KEY_TILE):
        q = key_desc.load([chunk * CHUNK, channel + part]).to(DOT)
        k = key_desc.load([chunk * CHUNK, channel + K_HEADS * BLOCK_K + part]).to(DOT)
        score = tl.dot(q, tl.trans(k), score, input_precision=PRECISION)
    score = tl.where(causal, score * between, 0.0)
    tl.store(score_ptr + rank * (CHUNK * CHUNK) + square, score.to(score_ptr.dtype.element_ty))

    system = tl.zeros([CHUNK, CHUNK], tl.float32)
    for part in tl.static_range(0, BLOCK_K, KEY_TILE):
        k = key_desc.load([chunk * CHUNK, channel + K_HEADS * BLOCK_K + part]).to(DOT)
        system = tl.dot(k, tl.trans(k), system, input_precision=PRECISION)
    system = tl.where(slot[:, None] > slot[None, :], system * between * beta[:, None], 0.0)
    solve = inverse_unit_lower(system, LEVELS, SOLVE, PRECISION) * beta[None, :]
    tl.store(solve_ptr + rank * (CHUNK * CHUNK) + square, solve.to(solve_ptr.dtype.element_ty))
