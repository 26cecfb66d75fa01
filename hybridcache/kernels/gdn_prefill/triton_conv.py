"""GDN prefill's launches before chunks: conv, SiLU and q/k l2norm of every token, gates, the index of chunks, conv rings.

The conv reads the inputs before a row's first token from its ring, so the ring is written by a later launch
(:func:`ring_kernel`): programs of one launch that read old columns and wrote new ones would race.

The outputs q, k and beta v lie by chunks, ``[M, slots, heads of q | k | v, padded dim]``: a chunk's tile holds no other row's
tokens, whose values might be anything. A slot without a token holds 0.

Shapes: T tokens, B rows, C conv channels (``q | k | v``), W conv kernel width, M chunks, N checkpoints of a row.
"""

import triton
import triton.language as tl

from hybridcache.kernels.gdn_prefill.triton_gates import ROWS_OF_GATES, store_gates


@triton.jit
def find_chunk(chunk, cu_ptr, start_ptr, rows, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Row and number inside the row of the chunk with that rank among the chunks of all rows, and how many there are.

    Beyond the last chunk the row is ``rows``."""
    row = 0
    first = 0
    count = 0
    for base in range(0, rows, ROWS):
        b = base + tl.arange(0, ROWS)
        inside = b < rows
        begin = tl.load(cu_ptr + b, mask=inside, other=0).to(tl.int32)
        end = tl.load(cu_ptr + b + 1, mask=inside, other=0).to(tl.int32)
        start = tl.load(start_ptr + b, mask=inside, other=0).to(tl.int32)
        chunks = tl.where(end > begin, (start % CHUNK + end - begin + CHUNK - 1) // CHUNK, 0)
        last = count + tl.cumsum(chunks, 0)
        passed = inside & (last <= chunk)
        row += tl.sum(passed.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(passed, last, 0), 0))
        count += tl.sum(chunks, 0)
    return row, chunk - first, count


@triton.jit
def conv_tile(
    y_ptr,
    x_ptr,
    weight_ptr,
    ring_ptr,
    channel,
    slot,
    seen,
    position,
    resumed,
    scale,
    x_stride,
    weight_stride_c,
    weight_stride_w,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    Y_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
):
    """One head of one chunk: conv, SiLU and, with NORM, l2-normalisation of rows; row ``i`` times ``scale[i]``. Columns
    beyond DIM are 0.

    ``x_ptr`` and ``y_ptr`` point to slot 0. ``seen`` is how many tokens of this step precede a slot's token, negative in
    a slot without one, whose row becomes 0. Where ``resumed``, inputs before the step's first token are in the ring.
    """
    c = tl.arange(0, BLOCK)
    inside = c < DIM
    x_offset = slot[:, None] * x_stride + (channel + c)[None, :]
    weight_ptr += (channel + c) * weight_stride_c
    acc = tl.zeros([slot.shape[0], BLOCK], tl.float32)
    for back in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + (WIDTH - 1 - back) * weight_stride_w, mask=inside, other=0.0).to(tl.float32)
        mask = (seen >= back)[:, None] & inside[None, :]
        x = tl.load(x_ptr - back * x_stride + x_offset, mask=mask, other=0.0)
        acc += x.to(tl.float32) * weight[None, :]
    if resumed:
        for back in tl.static_range(1, WIDTH):
            weight = tl.load(weight_ptr + (WIDTH - 1 - back) * weight_stride_w, mask=inside, other=0.0).to(tl.float32)
            stored = (seen >= 0) & (seen < back) & (position >= back)
            column = tl.where(stored, position - back, 0) % WIDTH
            mask = stored[:, None] & inside[None, :]
            past = tl.load(ring_ptr + column[:, None] * CHANNELS + (channel + c)[None, :], mask=mask, other=0.0)
            acc += past.to(tl.float32) * weight[None, :]
    y = acc / (1.0 + tl.exp(-acc))
    if NORM:
        scale *= tl.rsqrt(tl.sum(y * y, 1) + EPS)
    y *= scale[:, None]
    tl.store(y_ptr + slot[:, None] * Y_CHANNELS + c[None, :], y.to(y_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=["layer", "rows", "tokens"],
    do_not_specialize_on_alignment=["index_ptr", "first_ptr", "cu_ptr", "start_ptr", "table_ptr", "a_ptr", "b_ptr"],
)
def conv_kernel(
    y_ptr,
    gates_ptr,
    index_ptr,
    first_ptr,
    out_ptr,
    x_ptr,
    weight_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    ring_ptr,
    table_ptr,
    cu_ptr,
    start_ptr,
    layer,
    rows,
    tokens,
    x_stride: tl.int64,
    weight_stride_c: tl.int64,
    weight_stride_w: tl.int64,
    a_stride: tl.int64,
    b_stride: tl.int64,
    table_stride: tl.int64,
    ring_base: tl.int64,
    ring_stride: tl.int64,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
):
    """A program does one head (of q, k and v in turn) of one chunk; those of v also their gates. Head 0 notes the chunk's
    row (-1 where there is nothing to do) and number, and the row's first chunk.

    The output of tokens that no live row owns is zeroed here; no later launch writes it."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    CHANNELS: tl.constexpr = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
    Y_CHANNELS: tl.constexpr = 2 * K_HEADS * BLOCK_K + V_HEADS * HEAD_V
    slot = tl.arange(0, CHUNK)
    v_head = head - 2 * K_HEADS

    row, number, count = find_chunk(chunk, cu_ptr, start_ptr, rows, CHUNK, ROWS)
    # The programs beyond the last row's chunks are at least as many as chunks of tokens behind the last row.
    begin = tl.load(cu_ptr + row).to(tl.int32)
    end = tokens
    start = 0
    entry = tl.full([], -1, tl.int64)
    number = tl.where(row < rows, number, chunk - count)
    if row < rows:
        end = tl.load(cu_ptr + row + 1).to(tl.int32)
        start = tl.load(start_ptr + row).to(tl.int32)
        entry = tl.load(table_ptr + row * table_stride + layer).to(tl.int64)
    token0 = begin - start % CHUNK + number * CHUNK
    seen = tl.where(token0 + slot < end, token0 + slot - begin, -1)
    if head == 0:
        tl.store(index_ptr + 2 * chunk, tl.where(entry < 0, -1, row))
        tl.store(index_ptr + 2 * chunk + 1, number)
        if (row < rows) & (number == 0):
            tl.store(first_ptr + row, chunk)
    if entry < 0:
        if v_head >= 0:
            out_ptr += (token0.to(tl.int64) * V_HEADS + v_head) * VALUE_DIM
            zero_tile(out_ptr, slot, seen, V_HEADS * VALUE_DIM, VALUE_DIM, HEAD_V)
        return
    y_ptr += chunk.to(tl.int64) * (CHUNK * Y_CHANNELS)
    x_ptr += token0.to(tl.int64) * x_stride
    ring_ptr += ring_base + entry * ring_stride
    position = start + seen
    resumed = (start > 0) & (token0 - begin < WIDTH - 1)
    if v_head < 0:
        scale = tl.where((head < K_HEADS) & (slot >= 0), SCALE, 1.0)
        conv_tile(
            y_ptr + head * BLOCK_K, x_ptr, weight_ptr, ring_ptr, head * KEY_DIM, slot, seen, position, resumed, scale, x_stride,
            weight_stride_c, weight_stride_w, True, KEY_DIM, BLOCK_K, CHANNELS, Y_CHANNELS, WIDTH, EPS,
        )  # fmt: skip
    else:
        beta = store_gates(
            gates_ptr + (chunk.to(tl.int64) * V_HEADS + v_head) * (ROWS_OF_GATES * CHUNK),
            a_ptr + token0.to(tl.int64) * a_stride + v_head,
            b_ptr + token0.to(tl.int64) * b_stride + v_head,
            tl.load(a_log_ptr + v_head).to(tl.float32),
            tl.load(dt_bias_ptr + v_head).to(tl.float32),
            slot,
            seen >= 0,
            a_stride,
            b_stride,
        )
        channel = 2 * K_HEADS * KEY_DIM + v_head * VALUE_DIM
        y_ptr += 2 * K_HEADS * BLOCK_K + v_head * HEAD_V
        conv_tile(
            y_ptr, x_ptr, weight_ptr, ring_ptr, channel, slot, seen, position, resumed, beta, x_stride,
            weight_stride_c, weight_stride_w, False, VALUE_DIM, HEAD_V, CHANNELS, Y_CHANNELS, WIDTH, EPS,
        )  # fmt: skip


@triton.jit
def zero_tile(ptr, slot, seen, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the first DIM columns of the rows of slots that hold a token. ``ptr`` points to slot 0."""
    c = tl.arange(0, BLOCK)
    mask = (seen >= 0)[:, None] & (c < DIM)[None, :]
    tl.store(
        ptr + slot[:, None] * STRIDE + c[None, :], tl.zeros([slot.shape[0], BLOCK], ptr.dtype.element_ty), mask=mask
    )


@triton.jit(
    do_not_specialize=["layer", "interval"],
    do_not_specialize_on_alignment=["cu_ptr", "start_ptr", "table_ptr", "checkpoint_ptr"],
)
def ring_kernel(
    ring_ptr,
    x_ptr,
    table_ptr,
    checkpoint_ptr,
    cu_ptr,
    start_ptr,
    layer,
    interval,
    x_stride: tl.int64,
    table_stride: tl.int64,
    checkpoint_stride_b: tl.int64,
    checkpoint_stride_n: tl.int64,
    ring_base: tl.int64,
    ring_stride: tl.int64,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKPOINTS: tl.constexpr,
):
    """Bring a row's ring up to date, and write the rings of its checkpoints. A program does some channels of one
    checkpoint; that of the first checkpoint also does the row's own ring, because it alone may need inputs from the
    row's ring (a later checkpoint lies at least 64 tokens behind the first input of this step)."""
    rank = tl.program_id(1)
    row = tl.program_id(2)
    entry = tl.load(table_ptr + row * table_stride + layer).to(tl.int64)
    begin = tl.load(cu_ptr + row).to(tl.int32)
    end = tl.load(cu_ptr + row + 1).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    if (entry < 0) | (end <= begin):
        return
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < CHANNELS
    ring_ptr += ring_base + c
    own = ring_ptr + entry * ring_stride
    x_ptr += begin.to(tl.int64) * x_stride + c
    if CHECKPOINTS:
        position = (start // interval + 1 + rank) * interval
        if position <= start + end - begin:
            kept = tl.load(checkpoint_ptr + row * checkpoint_stride_b + rank * checkpoint_stride_n + layer).to(tl.int64)
            for back in tl.static_range(1, WIDTH + 1):
                past = position - back
                column = past % WIDTH
                old = tl.load(
                    own + column * CHANNELS, mask=inside & (past < start) & (past >= 0) & (kept >= 0), other=0.0
                )
                new = tl.load(
                    x_ptr + (past - start).to(tl.int64) * x_stride, mask=inside & (past >= start), other=0.0
                ).to(ring_ptr.dtype.element_ty)
                tl.store(
                    ring_ptr + kept * ring_stride + column * CHANNELS,
                    tl.where(past < start, old, new),
                    mask=inside & (past >= 0) & (kept >= 0),
                )
        if rank > 0:
            return
        # The old columns are read before they are written.
        tl.debug_barrier()
    position = start + end - begin
    for back in tl.static_range(1, WIDTH + 1):
        past = position - back
        mask = inside & (past >= start)
        x = tl.load(x_ptr + (past - start).to(tl.int64) * x_stride, mask=mask, other=0.0)
        tl.store(own + (past % WIDTH) * CHANNELS, x.to(ring_ptr.dtype.element_ty), mask=mask)
