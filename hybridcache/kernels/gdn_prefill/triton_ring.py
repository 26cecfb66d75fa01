"""GDN prefill's launch over conv rings: those of rows, and those of their checkpoints."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["layer", "interval"],
    do_not_specialize_on_alignment=["cu_ptr", "start_ptr", "read_ptr", "write_ptr", "checkpoint_ptr"],
)
def ring_kernel(
    ring_ptr, x_ptr, read_ptr, write_ptr, checkpoint_ptr, cu_ptr, start_ptr, layer, interval,
    x_stride: tl.int64, read_stride: tl.int64, write_stride: tl.int64, checkpoint_stride_b: tl.int64,
    checkpoint_stride_n: tl.int64, ring_base: tl.int64, ring_stride: tl.int64,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """Bring a row's ring up to date, and write the rings of its checkpoints. A program does some channels of one
    checkpoint; that of the first checkpoint also does the row's own ring, because it alone may need inputs from the
    row's ring (a later checkpoint lies at least 64 tokens behind the first input of this step)."""
    rank = tl.program_id(1)
    row = tl.program_id(2)
    source = tl.load(read_ptr + row * read_stride + layer).to(tl.int64)
    target = tl.load(write_ptr + row * write_stride + layer).to(tl.int64)
    begin = tl.load(cu_ptr + row).to(tl.int32)
    end = tl.load(cu_ptr + row + 1).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    if (target < 0) | (end <= begin):
        return
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < CHANNELS
    ring_ptr += ring_base + c
    old_ptr = ring_ptr + source * ring_stride
    own = ring_ptr + target * ring_stride
    x_ptr += begin.to(tl.int64) * x_stride + c
    if CHECKPOINTS:
        position = (start // interval + 1 + rank) * interval
        if position <= start + end - begin:
            kept = tl.load(checkpoint_ptr + row * checkpoint_stride_b + rank * checkpoint_stride_n + layer).to(tl.int64)
            for back in tl.static_range(1, WIDTH + 1):
                past = position - back
                column = past % WIDTH
                old = tl.load(
                    old_ptr + column * CHANNELS, mask=inside & (past < start) & (past >= 0) & (kept >= 0), other=0.0
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
        # A ring in another block takes the inputs before this step, too.
        mask = inside & (past < start) & (past >= 0) & (source != target)
        old = tl.load(old_ptr + (past % WIDTH) * CHANNELS, mask=mask, other=0.0)
        tl.store(own + (past % WIDTH) * CHANNELS, old, mask=mask)
