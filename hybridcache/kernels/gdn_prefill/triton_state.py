"""GDN prefill's launch over states: each goes through its row's chunks and gives their outputs.

Names as in :mod:`hybridcache.kernels.gdn_prefill.triton`.
"""

import triton
import triton.language as tl

from hybridcache.kernels.gdn_prefill.triton_gates import FROM_START, ROWS_OF_GATES, TO_END

PAST_THE_END = tl.constexpr(1 << 30)
"""A token that no step has."""


@triton.jit(
    do_not_specialize=["layer", "interval", "checkpoints"],
    do_not_specialize_on_alignment=["first_ptr", "cu_ptr", "start_ptr", "read_ptr", "write_ptr", "checkpoint_ptr"],
)
def state_kernel(
    out_ptr, state_ptr, key_desc, value_desc, solve_desc, score_desc, gates_desc, out_desc, gates_ptr, first_ptr,
    read_ptr, write_ptr, checkpoint_ptr, cu_ptr, start_ptr, layer, interval, checkpoints,
    read_stride: tl.int64, write_stride: tl.int64, checkpoint_stride_b: tl.int64, checkpoint_stride_n: tl.int64,
    state_base: tl.int64, state_stride: tl.int64,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_V: tl.constexpr, CHECKPOINTS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program carries some value dims of one value head of one row through all chunks of the row, in registers."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    source = tl.load(read_ptr + row * read_stride + layer).to(tl.int64)
    write_ptr += row * write_stride + layer
    begin = tl.load(cu_ptr + row).to(tl.int32)
    end = tl.load(cu_ptr + row + 1).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    if (tl.load(write_ptr) < 0) | (end <= begin):
        return
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    i = tl.arange(0, BLOCK_K)
    i_inside = i < KEY_DIM
    j = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    j_inside = j < VALUE_DIM
    slot = tl.arange(0, CHUNK)

    # The state lies as [key dim, value dim] and is kept transposed, so that it can stay in registers as the left
    # operand of two products, and its update is the result of a third.
    state_ptr += state_base + head * (KEY_DIM * VALUE_DIM)
    inside = j_inside[:, None] & i_inside[None, :]
    stored = (state_ptr + source * state_stride + j)[:, None] + i[None, :] * VALUE_DIM
    state = tl.load(stored, mask=inside & (start > 0), other=0.0).to(tl.float32)

    token0 = begin - start % CHUNK
    chunks = tl.cdiv(end - token0, CHUNK)
    q_channel = (head // GROUP) * BLOCK_K
    k_channel = q_channel + K_HEADS * BLOCK_K
    v_channel = 2 * K_HEADS * BLOCK_K + head * HEAD_V + tile * BLOCK_V
    first_chunk = tl.load(first_ptr + row)
    out_ptr += (token0.to(tl.int64) * V_HEADS + head) * VALUE_DIM
    out_offset = slot[None, :] * (V_HEADS * VALUE_DIM) + j[:, None]
    gates_ptr += FROM_START * CHUNK + CHUNK - 1

    if CHECKPOINTS:
        rank = 0
        due = begin - start + (start // interval + 1) * interval
    decay = tl.load(gates_ptr + (first_chunk * V_HEADS + head) * (ROWS_OF_GATES * CHUNK))
    for n in tl.range(0, chunks, num_stages=STAGES):
        chunk = first_chunk + n
        token = token0 + n * CHUNK
        square = (chunk * V_HEADS + head) * CHUNK
        # Loaded one turn ahead; behind the last chunk, the last chunk's own.
        following = tl.minimum(chunk + 1, first_chunk + chunks - 1) * V_HEADS + head
        next_decay = tl.load(gates_ptr + following * (ROWS_OF_GATES * CHUNK))
        k = key_desc.load([chunk * CHUNK, k_channel]).to(DOT)
        q = key_desc.load([chunk * CHUNK, q_channel]).to(DOT)
        v = value_desc.load([chunk * CHUNK, v_channel])
        solve = solve_desc.load([square, 0]).to(DOT)
        score = score_desc.load([square, 0]).to(DOT)
        from_start = gates_desc.load([square * ROWS_OF_GATES + FROM_START * CHUNK])
        to_end = gates_desc.load([square * ROWS_OF_GATES + TO_END * CHUNK])

        left = state.to(DOT)
        seen = tl.dot(left, tl.trans(k), input_precision=PRECISION)
        diff = tl.trans(v).to(tl.float32) - seen * from_start[None, :]
        new = tl.dot(diff.to(DOT), tl.trans(solve), input_precision=PRECISION)
        out = tl.dot(left, tl.trans(q), input_precision=PRECISION) * from_start[None, :]
        out = tl.dot(new.to(DOT), tl.trans(score), out, input_precision=PRECISION)
        state = tl.dot((new * to_end[None, :]).to(DOT), k, state * decay, input_precision=PRECISION)
        whole = (token >= begin) & (token + CHUNK <= end)
        if VALUE_DIM == HEAD_V:
            # The store stands outside conditions, which Triton 3.6 can't pipeline: a partial tile's lies past the end and is
            # dropped.
            place = tl.where(whole, token, PAST_THE_END)
            out_desc.store([place, head * VALUE_DIM + tile * BLOCK_V], tl.trans(out).to(out_ptr.dtype.element_ty))
        if (VALUE_DIM != HEAD_V) or not whole:  # where they differ, a tile of the descriptor reaches into the next head
            valid = (token + slot >= begin) & (token + slot < end)
            tl.store(
                out_ptr + (token - token0).to(tl.int64) * (V_HEADS * VALUE_DIM) + out_offset,
                out.to(out_ptr.dtype.element_ty),
                mask=valid[None, :] & j_inside[:, None],
            )
        decay = next_decay
        if CHECKPOINTS:  # noqa: SIM102 (known when the kernel is compiled)
            if (token + CHUNK == due) & (due <= end) & (rank < checkpoints):
                kept = tl.load(checkpoint_ptr + row * checkpoint_stride_b + rank * checkpoint_stride_n + layer).to(
                    tl.int64
                )
                if kept >= 0:
                    target = (state_ptr + kept * state_stride + j)[:, None] + i[None, :] * VALUE_DIM
                    tl.store(target, state.to(state_ptr.dtype.element_ty), mask=inside)
                rank += 1
                due += interval
    # Read here, so that the addresses need no registers during the loop.
    entry = tl.load(write_ptr).to(tl.int64)
    target = (state_ptr + entry * state_stride + j)[:, None] + i[None, :] * VALUE_DIM
    tl.store(target, state.to(state_ptr.dtype.element_ty), mask=inside)
