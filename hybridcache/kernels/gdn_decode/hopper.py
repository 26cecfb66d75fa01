"""GDN decode in Gluon, Triton's language of explicit layouts: the state passes through shared memory instead of registers.

A program takes one tile of value dims of one value head of one row, as in ``triton.py``, and computes the same. There a tile
waits in registers, widened to float32, and they bound the state bytes that a multiprocessor holds at a time: 64 KiB in
bfloat16 against 128 KiB in float32. Here asynchronous copies (``cp.async``, 16 bytes by every thread) bring the tile into
shared memory, chunk by chunk, so that

- about 190 KiB are resident, in either type, and the conv, the gates and the sums over the first chunks run while later
  ones are on their way;
- both passes over the tile read few rows at a time, so a thread gets by with few registers.

The rows of a tile are key dims. The channels of q, k and the tile's v pass through one conv, several of them to a thread.
"""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridcache.kernels.gdn_decode.tiles import SharedTiles, rows_at_once, shape_constants
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import torch_dtype


@constexpr_function
def tile_layout(block_v, dtype, num_warps):
    """A thread holds 16 bytes of a row; warps lie along the rows, so that an access covers whole rows."""
    vector = 128 // dtype.primitive_bitwidth
    lanes = min(32, block_v // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@constexpr_function
def conv_layout(channels, width, num_warps, by_channel):
    """A thread holds all taps of some channels, which lie side by side; taps are its inner dimension or channels are
    (``by_channel``), whichever memory has together."""
    order = [0, 1] if by_channel else [1, 0]
    return gl.BlockedLayout([max(1, channels // (32 * num_warps)), width], [32, 1], [num_warps, 1], order)


@constexpr_function
def warp_layout(size, num_warps):
    """Every warp holds all of a vector, so that its sum takes no other warp."""
    return gl.BlockedLayout([max(1, size // 32)], [32], [num_warps], [0])


@constexpr_function
def power_of_two(size):
    """The least that holds ``size``."""
    return 1 << (size - 1).bit_length()


@gluon.jit
def copy_tile(tiles, source_ptr, seen, VALUE_DIM: gl.constexpr, layout: gl.constexpr):
    """Ask for all chunks of a tile, one group each. Rows that are masked arrive as zeros."""
    CHUNKS: gl.constexpr = tiles.shape[0]
    CHUNK: gl.constexpr = tiles.shape[1]
    BLOCK_V: gl.constexpr = tiles.shape[2]
    row = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))[:, None]
    offset = row * VALUE_DIM + gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, layout))[None, :]
    for n in gl.static_range(CHUNKS):
        async_copy.async_copy_global_to_shared(
            tiles.index(n), source_ptr + n * (CHUNK * VALUE_DIM) + offset, mask=seen & (row >= 0)
        )
        async_copy.commit_group()


@gluon.jit
def add_triples(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@gluon.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr", "read_ptr", "write_ptr", "position_ptr"],
)
def shared_decode_kernel(
    state_ptr, ring_ptr, x_ptr, weight_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, read_ptr, write_ptr, position_ptr,
    out_ptr, layer,
    x_stride: gl.int64, a_stride: gl.int64, b_stride: gl.int64, read_stride: gl.int64, write_stride: gl.int64,
    state_base: gl.int64, state_stride: gl.int64, ring_base: gl.int64, ring_stride: gl.int64,
    WEIGHT_STRIDE_C: gl.constexpr, WEIGHT_STRIDE_W: gl.constexpr, V_HEADS: gl.constexpr, GROUP: gl.constexpr,
    KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, CHANNELS: gl.constexpr, WIDTH: gl.constexpr, BLOCK_V: gl.constexpr,
    CHUNKS: gl.constexpr, ROWS: gl.constexpr, EVICTION: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr,
    SCALE: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """Grid: (tiles of value dims, value heads, rows)."""
    dtype: gl.constexpr = state_ptr.dtype.element_ty
    layout: gl.constexpr = tile_layout(BLOCK_V, dtype, gl.num_warps())
    key_layout: gl.constexpr = gl.SliceLayout(1, layout)
    value_layout: gl.constexpr = gl.SliceLayout(0, layout)
    CHUNK: gl.constexpr = KEY_DIM // CHUNKS
    K_CHANNELS: gl.constexpr = (V_HEADS // GROUP) * KEY_DIM

    tile = gl.program_id(0)
    head = gl.program_id(1)
    row = gl.program_id(2).to(gl.int64)
    first_value = tile * BLOCK_V
    j = gl.arange(0, BLOCK_V, layout=value_layout)
    out_ptr += (row * V_HEADS + head) * VALUE_DIM + first_value

    if DEPENDENT_LAUNCH:
        gdc_launch_dependents()
        gdc_wait()
    position = gl.load(position_ptr + row).to(gl.int32)
    source = gl.load(read_ptr + row * read_stride + layer).to(gl.int64)
    target = gl.load(write_ptr + row * write_stride + layer).to(gl.int64)
    a = gl.load(a_ptr + row * a_stride + head).to(gl.float32) + gl.load(dt_bias_ptr + head).to(gl.float32)
    b = gl.load(b_ptr + row * b_stride + head).to(gl.float32)
    rate = gl.load(a_log_ptr + head).to(gl.float32)
    if target < 0:
        gl.store(out_ptr + j, gl.zeros([BLOCK_V], gl.float32, layout=value_layout).to(out_ptr.dtype.element_ty))
        return

    state_ptr += state_base + head * (KEY_DIM * VALUE_DIM) + first_value
    written_state_ptr = state_ptr + target * state_stride
    state_ptr += source * state_stride
    written_ring_ptr = ring_ptr + ring_base + target * ring_stride
    ring_ptr += ring_base + source * ring_stride
    x_ptr += row * x_stride
    tiles = gl.allocate_shared_memory(dtype, [CHUNKS, CHUNK, BLOCK_V], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    # One conv for the channels of q, of k and of the tile's v. Its loads go out before the state's, so that its arithmetic
    # does not wait for the last of them.
    OWN: gl.constexpr = power_of_two(2 * KEY_DIM + BLOCK_V)
    own_layout: gl.constexpr = conv_layout(OWN, WIDTH, gl.num_warps(), True)
    weight_layout: gl.constexpr = conv_layout(OWN, WIDTH, gl.num_warps(), WEIGHT_STRIDE_C == 1)
    q_channel = (head // GROUP) * KEY_DIM
    v_channel = 2 * K_CHANNELS + head * VALUE_DIM + first_value
    c = gl.arange(0, OWN, layout=gl.SliceLayout(1, own_layout))
    q_or_k = gl.where(c < KEY_DIM, q_channel, K_CHANNELS - KEY_DIM + q_channel)
    channel = gl.where(c < 2 * KEY_DIM, q_or_k, v_channel - 2 * KEY_DIM) + c
    inside = c < 2 * KEY_DIM + BLOCK_V
    tap = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, own_layout))[None, :]
    # Tap t takes position - (WIDTH - 1 - t), which lies in the column below; positions before the first are not read.
    seen = (tap < WIDTH - 1) & (position >= WIDTH - 1 - tap)
    past_offset = ((position + 1 + tap) % WIDTH) * CHANNELS + channel[:, None]
    past = gl.load(ring_ptr + past_offset, mask=seen & inside[:, None], other=0.0)
    x = gl.load(x_ptr + channel, mask=inside, other=0.0)
    weight_c = gl.convert_layout(channel, gl.SliceLayout(1, weight_layout))[:, None]
    weight_inside = gl.convert_layout(inside, gl.SliceLayout(1, weight_layout))[:, None]
    weight_tap = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, weight_layout))[None, :]
    weight = gl.load(
        weight_ptr + weight_c * WEIGHT_STRIDE_C + weight_tap * WEIGHT_STRIDE_W,
        mask=weight_inside & (weight_tap >= 0),
        other=0.0,
    )
    copy_tile(tiles, state_ptr, position > 0, VALUE_DIM, layout)

    taps = gl.where(tap == WIDTH - 1, x[:, None].to(gl.float32), past.to(gl.float32))
    acc = gl.sum(taps * gl.convert_layout(weight, own_layout).to(gl.float32), 1)
    qkv = gl.allocate_shared_memory(gl.float32, [OWN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    qkv.store(acc / (1.0 + gl.exp(-acc)))
    written = inside & ((c >= 2 * KEY_DIM) | ((tile == 0) & (head % GROUP == 0)))
    gl.store(written_ring_ptr + (position % WIDTH) * CHANNELS + channel, x, mask=written)
    if source != target:
        gl.store(written_ring_ptr + past_offset, past, mask=seen & written[:, None])

    q = qkv.slice(0, KEY_DIM).load(warp_layout(KEY_DIM, gl.num_warps()))
    k = qkv.slice(KEY_DIM, KEY_DIM).load(warp_layout(KEY_DIM, gl.num_warps()))
    qq, kk, qk = gl.reduce((q * q, k * k, q * k), 0, add_triples)
    q_norm = gl.rsqrt(qq + EPS) * SCALE
    k_norm = gl.rsqrt(kk + EPS)
    softplus = gl.maximum(a, 0.0) + gl.log(1.0 + gl.exp(-gl.abs(a)))
    decay = gl.exp(-gl.exp(rate) * softplus)
    beta = 1.0 / (1.0 + gl.exp(-b))

    s = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
    t = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
    for n in gl.static_range(CHUNKS):
        async_copy.wait_group(CHUNKS - 1 - n)
        for r in gl.static_range(0, CHUNK, ROWS):
            state = tiles.index(n).slice(r, ROWS).load(layout).to(gl.float32)
            s += state * qkv.slice(KEY_DIM + n * CHUNK + r, ROWS).load(key_layout)[:, None]
            t += state * qkv.slice(n * CHUNK + r, ROWS).load(key_layout)[:, None]
    # One after the other, so that both use the same few KiB of shared memory: one program more on a multiprocessor.
    s = gl.sum(s, 0)
    t = gl.sum(t, 0)
    delta = (qkv.slice(2 * KEY_DIM, BLOCK_V).load(value_layout) - s * (decay * k_norm)) * beta
    out = t * (decay * q_norm) + delta * (qk * q_norm * k_norm)
    gl.store(out_ptr + j, out.to(out_ptr.dtype.element_ty))
    delta = (delta * k_norm)[None, :]
    in_chunk = gl.arange(0, CHUNK, layout=key_layout)[:, None] * VALUE_DIM + j[None, :]
    for n in gl.static_range(CHUNKS):
        k_rows = qkv.slice(KEY_DIM + n * CHUNK, CHUNK).load(key_layout)[:, None]
        state = (tiles.index(n).load(layout).to(gl.float32) * decay + k_rows * delta).to(dtype)
        gl.store(written_state_ptr + n * (CHUNK * VALUE_DIM) + in_chunk, state, eviction_policy=EVICTION)


def constants(
    layout: StateLayout, tiles: SharedTiles, weight_stride_CW: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Compile-time parameters of :func:`shared_decode_kernel` for a layout and the conv weight's strides (contiguous where
    None)."""
    return {
        **shape_constants(layout, tiles, weight_stride_CW),
        "BLOCK_V": tiles.block_v,
        "CHUNKS": tiles.chunks,
        "ROWS": rows_at_once(tiles, torch_dtype(layout.recurrent_dtype).itemsize),
    }
