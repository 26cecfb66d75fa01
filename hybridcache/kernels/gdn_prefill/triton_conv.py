"""GDN prefill's launch before chunks: conv, SiLU and q/k l2norm of every token, gates, the index of chunks.

The conv reads the inputs before a row's first token from its ring, so the ring is written by a later launch
(:mod:`.triton_ring`): programs of one launch that read old columns and wrote new ones would race.

The outputs q, k and v lie by chunks, ``[M, slots, heads of q | k | v, padded dim]``: a chunk's tile holds no other row's
tokens, whose values might be anything. A slot without a token holds 0.

Shapes: T tokens, B rows, C conv channels (``q | k | v``), W conv kernel width, M chunks.
"""

import triton
import triton.language as tl

from hybridcache.kernels.gdn_prefill.triton_gates import LOG2_E, ROWS_OF_GATES, store_gates


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
def silu(x):
    """``x / (1 + exp(-x))``, as cheap as the special function unit allows: a quotient would also guard against ranges that
    ``1 + exp(-x)`` never reaches."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return x * root * root


@triton.jit
def finish(acc, scale, NORM: tl.constexpr, EPS: tl.constexpr):
    """SiLU of rows and, with NORM, their l2-normalisation and ``scale``."""
    y = silu(acc)
    if NORM:
        y *= (tl.rsqrt(tl.sum(y * y, 1) + EPS) * scale)[:, None]
    return y


@triton.jit
def conv_whole(
    y_ptr, x_ptr, weight_ptr, scale,
    x_stride,
    WEIGHT_STRIDE_C: tl.constexpr, WEIGHT_STRIDE_W: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, Y_CHANNELS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """A head of a chunk whose slots all hold tokens, with the step's tokens before it. Threads walk down STEPS slots each and
    keep the inputs that the next slots share with this one."""
    c = tl.arange(0, BLOCK)
    first = tl.arange(0, CHUNK // STEPS) * STEPS
    x_ptr += first[:, None] * x_stride + c[None, :]
    y_ptr += first[:, None] * Y_CHANNELS + c[None, :]
    inputs = ()
    for at in tl.static_range(1 - WIDTH, STEPS):
        if DIM < BLOCK:
            x = tl.load(x_ptr + at * x_stride, mask=(c < DIM)[None, :], other=0.0)
        else:
            x = tl.load(x_ptr + at * x_stride)
        inputs = inputs + (x,)  # type: ignore[assignment]  # noqa: RUF005
    weights = ()
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + c * WEIGHT_STRIDE_C + tap * WEIGHT_STRIDE_W, mask=c < DIM, other=0.0)
        weights = weights + (weight.to(tl.float32)[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    for step in tl.static_range(STEPS):
        acc = inputs[step].to(tl.float32) * weights[0]  # type: ignore[misc]
        for tap in tl.static_range(1, WIDTH):
            acc += inputs[step + tap].to(tl.float32) * weights[tap]
        tl.store(y_ptr + step * Y_CHANNELS, finish(acc, scale, NORM, EPS).to(y_ptr.dtype.element_ty))


@triton.jit
def conv_edge(
    y_ptr, x_ptr, weight_ptr, ring_ptr, seen, length, start, scale,
    x_stride,
    WEIGHT_STRIDE_C: tl.constexpr, WEIGHT_STRIDE_W: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, Y_CHANNELS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    STEPS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """A head of any chunk. ``seen`` is how many tokens of this step precede slot 0's (negative: slot 0 lies before them),
    ``length`` how many the step has; inputs before them are in the ring, as far as positions go back. Rows of slots without
    a token are 0."""
    c = tl.arange(0, BLOCK)
    inside = (c < DIM)[None, :]
    first = tl.arange(0, CHUNK // STEPS) * STEPS
    for step in range(STEPS):
        slot = first + step
        held = (seen + slot >= 0) & (seen + slot < length)
        acc = tl.zeros([CHUNK // STEPS, BLOCK], tl.float32)
        for tap in range(WIDTH):
            weight = tl.load(weight_ptr + c * WEIGHT_STRIDE_C + tap * WEIGHT_STRIDE_W, mask=c < DIM, other=0.0)
            at = slot + (tap + 1 - WIDTH)
            token = seen + at
            x = tl.load(
                x_ptr + at[:, None] * x_stride + c[None, :], mask=(held & (token >= 0))[:, None] & inside, other=0.0
            )
            stored = held & (token < 0) & (start + token >= 0)
            column = tl.where(stored, start + token, 0) % WIDTH
            past = tl.load(ring_ptr + column[:, None] * CHANNELS + c[None, :], mask=stored[:, None] & inside, other=0.0)
            acc += (x.to(tl.float32) + past.to(tl.float32)) * weight.to(tl.float32)[None, :]
        y = finish(acc, scale, NORM, EPS)
        tl.store(y_ptr + slot[:, None] * Y_CHANNELS + c[None, :], y.to(y_ptr.dtype.element_ty))


@triton.jit
def conv_head(
    y_ptr, x_ptr, weight_ptr, ring_ptr, seen, length, start, scale,
    x_stride,
    WEIGHT_STRIDE_C: tl.constexpr, WEIGHT_STRIDE_W: tl.constexpr, NORM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, Y_CHANNELS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    STEPS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One head of one chunk: conv, SiLU and, with NORM, l2-normalisation of rows, times ``scale``. Columns beyond DIM are 0.
    Pointers are those of the head's first channel, of slot 0 where there are slots."""
    if (seen >= WIDTH - 1) & (seen + CHUNK <= length):
        conv_whole(
            y_ptr, x_ptr, weight_ptr, scale, x_stride, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, NORM, DIM, BLOCK, Y_CHANNELS, WIDTH,
            CHUNK, STEPS, EPS,
        )  # fmt: skip
    else:
        conv_edge(
            y_ptr, x_ptr, weight_ptr, ring_ptr, seen, length, start, scale, x_stride, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, NORM,
            DIM, BLOCK, CHANNELS, Y_CHANNELS, WIDTH, CHUNK, STEPS, EPS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["layer", "rows", "tokens"],
    do_not_specialize_on_alignment=["index_ptr", "first_ptr", "cu_ptr", "start_ptr", "read_ptr", "write_ptr", "a_ptr", "b_ptr"],
)  # fmt: skip
def conv_kernel(
    y_ptr, gates_ptr, index_ptr, first_ptr, out_ptr, x_ptr, weight_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, ring_ptr,
    read_ptr, write_ptr, cu_ptr, start_ptr, layer, rows, tokens,
    x_stride: tl.int64, a_stride: tl.int64, b_stride: tl.int64, read_stride: tl.int64, write_stride: tl.int64,
    ring_base: tl.int64, ring_stride: tl.int64,
    WEIGHT_STRIDE_C: tl.constexpr, WEIGHT_STRIDE_W: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, HEAD_V: tl.constexpr, GATE_HEADS: tl.constexpr, CONV_STEPS: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The first programs of a chunk do the gates of GATE_HEADS value heads each, the others the conv of a head (of q, k
    and v in turn). The very first notes the chunk's row (-1 where there is nothing to do) and number, and the row's
    first chunk.

    The output of tokens that no live row owns is zeroed here; no later launch writes it."""
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    CHANNELS: tl.constexpr = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
    Y_CHANNELS: tl.constexpr = 2 * K_HEADS * BLOCK_K + V_HEADS * HEAD_V
    GATES: tl.constexpr = (V_HEADS + GATE_HEADS - 1) // GATE_HEADS

    row, number, count = find_chunk(chunk, cu_ptr, start_ptr, rows, CHUNK, ROWS)
    # The programs beyond the last row's chunks are at least as many as chunks of tokens behind the last row.
    begin = tl.load(cu_ptr + row).to(tl.int32)
    end = tokens
    start = 0
    source = tl.full([], -1, tl.int64)
    live = False
    number = tl.where(row < rows, number, chunk - count)
    if row < rows:
        end = tl.load(cu_ptr + row + 1).to(tl.int32)
        start = tl.load(start_ptr + row).to(tl.int32)
        source = tl.load(read_ptr + row * read_stride + layer).to(tl.int64)
        live = tl.load(write_ptr + row * write_stride + layer) >= 0
    token0 = begin - start % CHUNK + number * CHUNK
    if program < GATES:
        if program == 0:
            tl.store(index_ptr + 2 * chunk, tl.where(live, row, -1))
            tl.store(index_ptr + 2 * chunk + 1, number)
            if (row < rows) & (number == 0):
                tl.store(first_ptr + row, chunk)
        if live:
            slot = tl.arange(0, CHUNK)
            store_gates(
                gates_ptr + chunk.to(tl.int64) * (V_HEADS * ROWS_OF_GATES * CHUNK),
                a_ptr + token0.to(tl.int64) * a_stride,
                b_ptr + token0.to(tl.int64) * b_stride,
                a_log_ptr,
                dt_bias_ptr,
                slot,
                (token0 + slot >= begin) & (token0 + slot < end),
                program * GATE_HEADS + tl.arange(0, GATE_HEADS),
                a_stride,
                b_stride,
                V_HEADS,
            )
        return
    head = program - GATES
    v_head = head - 2 * K_HEADS
    seen = token0 - begin
    length = end - begin
    if not live:
        if v_head >= 0:
            slot = tl.arange(0, CHUNK)
            held = (seen + slot >= 0) & (seen + slot < length)
            out_ptr += (token0.to(tl.int64) * V_HEADS + v_head) * VALUE_DIM
            zero_tile(out_ptr, slot, held, V_HEADS * VALUE_DIM, VALUE_DIM, HEAD_V)
        return
    y_ptr += chunk.to(tl.int64) * (CHUNK * Y_CHANNELS)
    x_ptr += token0.to(tl.int64) * x_stride
    ring_ptr += ring_base + source * ring_stride
    if v_head < 0:
        channel = head * KEY_DIM
        conv_head(
            y_ptr + head * BLOCK_K, x_ptr + channel, weight_ptr + channel * WEIGHT_STRIDE_C, ring_ptr + channel, seen, length,
            start, tl.where(head < K_HEADS, SCALE, 1.0), x_stride, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, True, KEY_DIM, BLOCK_K,
            CHANNELS, Y_CHANNELS, WIDTH, CHUNK, CONV_STEPS, EPS,
        )  # fmt: skip
    else:
        channel = 2 * K_HEADS * KEY_DIM + v_head * VALUE_DIM
        conv_head(
            y_ptr + 2 * K_HEADS * BLOCK_K + v_head * HEAD_V, x_ptr + channel, weight_ptr + channel * WEIGHT_STRIDE_C,
            ring_ptr + channel, seen, length, start, 1.0, x_stride, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, False, VALUE_DIM, HEAD_V,
            CHANNELS, Y_CHANNELS, WIDTH, CHUNK, CONV_STEPS, EPS,
        )  # fmt: skip


@triton.jit
def zero_tile(ptr, slot, held, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the first DIM columns of the rows of slots that hold a token (``held``). ``ptr`` points to slot 0."""
    c = tl.arange(0, BLOCK)
    mask = held[:, None] & (c < DIM)[None, :]
    tl.store(
        ptr + slot[:, None] * STRIDE + c[None, :], tl.zeros([slot.shape[0], BLOCK], ptr.dtype.element_ty), mask=mask
    )
