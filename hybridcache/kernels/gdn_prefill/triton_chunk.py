"""GDN prefill's launch over chunks: the two matrices of a chunk that no state enters.

Names as in :mod:`hybridcache.kernels.gdn_prefill.triton`.
"""

import triton
import triton.language as tl

from hybridcache.kernels.gdn_prefill.triton_gates import BETA, ROWS_OF_GATES, SINCE


@triton.jit
def inverse_unit_lower(minus, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """``(I - minus)^-1`` in float32 of a strictly lower triangular matrix of size ``2 ** LEVELS`` in the products' type.

    Starting from diagonal blocks of one, blocks double: ``[[A, 0], [-C, B]]`` has the inverse ``[[A', 0], [B' C A', B']]``.
    Each step does all blocks of its size at once: with D' the block diagonal of inverses so far and L the corners C, the
    next is ``D' + D' L D'``.
    """
    at = tl.arange(0, minus.shape[0])
    inverse = tl.where((at[:, None] ^ 1) == at[None, :], minus, 0.0).to(tl.float32)
    inverse = tl.where(at[:, None] == at[None, :], 1.0, inverse)
    for level in tl.range(1, LEVELS):
        block = at >> level
        corner = tl.where((block ^ 1)[:, None] == block[None, :], minus, 0.0)
        right = inverse.to(minus.dtype)
        half = tl.dot(corner, right, input_precision=PRECISION)
        inverse = tl.dot(right, half.to(minus.dtype), inverse, input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize_on_alignment=["index_ptr"])
def chunk_kernel(
    solve_ptr, score_ptr, y_ptr, gates_ptr, index_ptr,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_V: tl.constexpr, KEY_TILE: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr, SOLVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program does one value head of one chunk. Slots without a token have keys of 0, so that their rows and columns of
    ``score`` are 0, and a beta of 0, so that those of ``solve`` are."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    if tl.load(index_ptr + 2 * chunk) < 0:
        return
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    Y_CHANNELS: tl.constexpr = 2 * K_HEADS * BLOCK_K + V_HEADS * HEAD_V
    slot = tl.arange(0, CHUNK)
    part = tl.arange(0, KEY_TILE)
    rank = chunk.to(tl.int64) * V_HEADS + head
    q_ptr = y_ptr + chunk.to(tl.int64) * (CHUNK * Y_CHANNELS) + (head // GROUP) * BLOCK_K
    k_ptr = q_ptr + K_HEADS * BLOCK_K
    y_offset = slot[:, None] * Y_CHANNELS + part[None, :]
    gates_ptr += rank * (ROWS_OF_GATES * CHUNK)

    square = slot[:, None] * CHUNK + slot[None, :]

    score = tl.zeros([CHUNK, CHUNK], tl.float32)
    system = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.static_range(0, BLOCK_K, KEY_TILE):
        k = tl.load(k_ptr + first + y_offset).to(DOT)
        q = tl.load(q_ptr + first + y_offset).to(DOT)
        score = tl.dot(q, tl.trans(k), score, input_precision=PRECISION)
        system = tl.dot(k, tl.trans(k), system, input_precision=PRECISION)
    since = tl.load(gates_ptr + SINCE * CHUNK + slot)
    beta_ptr = gates_ptr + BETA * CHUNK + slot
    # Beta as a summand of the exponent costs a logarithm a row, and no product an entry.
    unwritten = since - tl.log2(tl.load(beta_ptr))
    # Above the diagonal powers may be infinite; nothing there is used.
    score = tl.where(slot[:, None] >= slot[None, :], score * tl.exp2(since[:, None] - since[None, :]), 0.0)
    tl.store(score_ptr + rank * (CHUNK * CHUNK) + square, score.to(score_ptr.dtype.element_ty))
    system = tl.where(slot[:, None] > slot[None, :], system * tl.exp2(since[:, None] - unwritten[None, :]), 0.0)
    solve = inverse_unit_lower((-system).to(SOLVE), LEVELS, PRECISION) * tl.load(beta_ptr)[:, None]
    tl.store(solve_ptr + rank * (CHUNK * CHUNK) + square, solve.to(solve_ptr.dtype.element_ty))
