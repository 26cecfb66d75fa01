"""GDN decode in Gluon, Triton's language of explicit layouts: the state passes through shared memory instead of registers.

A program takes one tile of value dims of one value head of one row, as in ``triton.py``, and computes the same. There a tile
waits in registers, widened to float32, and they bound the state bytes that a multiprocessor holds at a time: 64 KiB in
bfloat16 against 128 KiB in float32. Here asynchronous copies bring the tile into shared memory, chunk by chunk, so that

- about 190 KiB are resident, in either type, and the conv, the gates and the sums over the first chunks run while later
  ones are on their way;
- both passes over the tile read few rows at a time, so a thread gets by with few registers.

Copies are either ``cp.async`` of 16 bytes by every thread or one bulk (TMA) copy per chunk. The rows of a tile are key dims.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hybridcache.dtypes import torch_dtype
from hybridcache.kernels.gdn_decode import L2NORM_EPS
from hybridcache.kernels.gdn_decode.staging import Staging, rows_at_once, why_not
from hybridcache.kernels.memory import elements
from hybridcache.layout import StateLayout


@constexpr_function
def tile_layout(block_v, dtype, num_warps):
    """A thread holds 16 bytes of a row; warps lie along the rows, so that an access covers whole rows."""
    vector = min(block_v, 128 // dtype.primitive_bitwidth)
    lanes = min(32, block_v // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@constexpr_function
def conv_layout(width, num_warps):
    """A thread holds all taps of a channel."""
    return gl.BlockedLayout([1, width], [32, 1], [num_warps, 1], [1, 0])


@gluon.jit
def conv(
    x_ptr,
    weight_ptr,
    ring_ptr,
    first,
    position,
    CHANNELS_OF_TILE: gl.constexpr,
    CHANNELS: gl.constexpr,
    WIDTH: gl.constexpr,
    WEIGHT_STRIDE_C: gl.constexpr,
    WEIGHT_STRIDE_W: gl.constexpr,
):
    """Causal depthwise conv and SiLU of the channels from ``first`` on: the token's own inputs and the results."""
    layout: gl.constexpr = conv_layout(WIDTH, gl.num_warps())
    channel = gl.arange(0, CHANNELS_OF_TILE, layout=gl.SliceLayout(1, layout))
    tap = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))[None, :]
    weight_ptr += first * WEIGHT_STRIDE_C
    weight = gl.load(weight_ptr + channel[:, None] * WEIGHT_STRIDE_C + tap * WEIGHT_STRIDE_W)
    # Tap t takes position - (WIDTH - 1 - t), which lies in the column below; positions before the first are not read.
    column = (position + 1 + tap) % WIDTH
    seen = (tap < WIDTH - 1) & (position >= WIDTH - 1 - tap)
    past = gl.load(ring_ptr + first + column * CHANNELS + channel[:, None], mask=seen, other=0.0)
    x = gl.load(x_ptr + first + channel)
    taps = gl.where(tap == WIDTH - 1, x[:, None].to(gl.float32), past.to(gl.float32))
    acc = gl.sum(taps * weight.to(gl.float32), 1)
    return x, acc / (1.0 + gl.exp(-acc))


@constexpr_function
def staged_layout(dtype, bulk):
    """Rows one after another: an access of 16 bytes by every thread finds them without bank conflicts."""
    if bulk:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=dtype.primitive_bitwidth, rank=2)
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@gluon.jit
def add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@gluon.jit
def add_triples(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@gluon.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr", "table_ptr", "position_ptr"],
)
def shared_decode_kernel(
    state_desc,
    state_ptr,
    ring_ptr,
    x_ptr,
    weight_ptr,
    a_ptr,
    b_ptr,
    a_log_ptr,
    dt_bias_ptr,
    table_ptr,
    position_ptr,
    out_ptr,
    layer,
    x_stride: gl.int64,
    a_stride: gl.int64,
    b_stride: gl.int64,
    table_stride: gl.int64,
    state_stride: gl.int64,
    ring_base: gl.int64,
    ring_stride: gl.int64,
    WEIGHT_STRIDE_C: gl.constexpr,
    WEIGHT_STRIDE_W: gl.constexpr,
    V_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    KEY_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    CHANNELS: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCK_V: gl.constexpr,
    CHUNKS: gl.constexpr,
    ROWS: gl.constexpr,
    BULK: gl.constexpr,
    DEPENDENT_LAUNCH: gl.constexpr,
    SCALE: gl.constexpr,
    EPS: gl.constexpr,
):
    """Grid: (tiles of value dims, value heads / ``HEADS``, rows)."""
    dtype: gl.constexpr = state_ptr.dtype.element_ty
    layout: gl.constexpr = tile_layout(BLOCK_V, dtype, gl.num_warps())
    key_layout: gl.constexpr = gl.SliceLayout(1, layout)
    value_layout: gl.constexpr = gl.SliceLayout(0, layout)
    CHUNK: gl.constexpr = KEY_DIM // CHUNKS
    K_CHANNELS: gl.constexpr = (V_HEADS // GROUP) * KEY_DIM

    tile = gl.program_id(0)
    first_head = gl.program_id(1) * HEADS
    row = gl.program_id(2).to(gl.int64)
    first_value = tile * BLOCK_V
    j = gl.arange(0, BLOCK_V, layout=value_layout)
    out_ptr += (row * V_HEADS + first_head) * VALUE_DIM + first_value

    if DEPENDENT_LAUNCH:
        gdc_launch_dependents()
        gdc_wait()
    position = gl.load(position_ptr + row).to(gl.int32)
    entry = gl.load(table_ptr + row * table_stride + layer).to(gl.int64)
    if entry < 0:
        for head in gl.static_range(HEADS):
            zero = gl.zeros([BLOCK_V], gl.float32, layout=value_layout)
            gl.store(out_ptr + head * VALUE_DIM + j, zero.to(out_ptr.dtype.element_ty))
        return

    state_offset = entry * state_stride + first_head * (KEY_DIM * VALUE_DIM) + first_value
    state_ptr += state_offset
    ring_ptr += ring_base + entry * ring_stride
    x_ptr += row * x_stride

    shared_layout: gl.constexpr = staged_layout(dtype, BULK)
    tiles = gl.allocate_shared_memory(dtype, [HEADS * CHUNKS, CHUNK, BLOCK_V], shared_layout)
    row_of_chunk = gl.arange(0, CHUNK, layout=key_layout)[:, None]
    in_chunk = row_of_chunk * VALUE_DIM + j[None, :]
    seen = position > 0
    # fmt: off
    if BULK:
        arrived = gl.allocate_shared_memory(gl.int64, [HEADS * CHUNKS, 1], mbarrier.MBarrierLayout())
        first_row = (state_offset // VALUE_DIM).to(gl.int32)
        for n in gl.static_range(HEADS * CHUNKS):
            mbarrier.init(arrived.index(n), count=1)
        fence_async_shared()
        for n in gl.static_range(HEADS * CHUNKS):
            mbarrier.expect(arrived.index(n), CHUNK * BLOCK_V * (dtype.primitive_bitwidth // 8), pred=seen)
            tma.async_copy_global_to_shared(
                state_desc, [first_row + n * CHUNK, first_value], arrived.index(n), tiles.index(n), pred=seen
            )
    else:
        for n in gl.static_range(HEADS * CHUNKS):
            # Rows that are masked arrive as zeros.
            source = state_ptr + n * (CHUNK * VALUE_DIM) + in_chunk
            async_copy.async_copy_global_to_shared(tiles.index(n), source, mask=seen & (row_of_chunk >= 0))
            async_copy.commit_group()
    # fmt: on

    # Everything else that comes from memory is asked for before the first barrier.
    q_channel = (first_head // GROUP) * KEY_DIM
    k_channel = K_CHANNELS + q_channel
    column = ring_ptr + (position % WIDTH) * CHANNELS
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    v_shared = gl.allocate_shared_memory(gl.float32, [HEADS, BLOCK_V], vector_layout)
    gates = ()
    for head in gl.static_range(HEADS):
        v_head = first_head + head
        a = gl.load(a_ptr + row * a_stride + v_head).to(gl.float32) + gl.load(dt_bias_ptr + v_head).to(gl.float32)
        b = gl.load(b_ptr + row * b_stride + v_head).to(gl.float32)
        rate = gl.load(a_log_ptr + v_head).to(gl.float32)
        gates = gates + ((a, b, rate),)  # type: ignore[assignment]  # noqa: RUF005
    # fmt: off
    x_q, q = conv(
        x_ptr, weight_ptr, ring_ptr, q_channel, position, KEY_DIM, CHANNELS, WIDTH, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W
    )
    x_k, k = conv(
        x_ptr, weight_ptr, ring_ptr, k_channel, position, KEY_DIM, CHANNELS, WIDTH, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W
    )
    for head in gl.static_range(HEADS):
        v_channel = 2 * K_CHANNELS + (first_head + head) * VALUE_DIM + first_value
        x_v, v = conv(
            x_ptr, weight_ptr, ring_ptr, v_channel, position, BLOCK_V, CHANNELS, WIDTH, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W
        )
        gl.store(column + v_channel + gl.arange(0, BLOCK_V, layout=x_v.type.layout), x_v)
        v_shared.index(head).store(v)
    # fmt: on
    q_shared = gl.allocate_shared_memory(gl.float32, [KEY_DIM], vector_layout, q)
    k_shared = gl.allocate_shared_memory(gl.float32, [KEY_DIM], vector_layout, k)
    if (tile == 0) & (first_head % GROUP == 0):
        i = gl.arange(0, KEY_DIM, layout=x_q.type.layout)
        gl.store(column + q_channel + i, x_q)
        gl.store(column + k_channel + i, x_k)
    qq, kk, qk = gl.reduce((q * q, k * k, q * k), 0, add_triples)
    q_norm = gl.rsqrt(qq + EPS) * SCALE
    k_norm = gl.rsqrt(kk + EPS)

    for head in gl.static_range(HEADS):
        a, b, rate = gates[head]
        softplus = gl.maximum(a, 0.0) + gl.log(1.0 + gl.exp(-gl.abs(a)))
        decay = gl.exp(-gl.exp(rate) * softplus)
        beta = 1.0 / (1.0 + gl.exp(-b))
        s = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
        t = gl.zeros([ROWS, BLOCK_V], gl.float32, layout=layout)
        for c in gl.static_range(CHUNKS):
            if BULK:
                mbarrier.wait(arrived.index(head * CHUNKS + c), 0, pred=seen)
                if position <= 0:
                    tiles.index(head * CHUNKS + c).store(gl.zeros([CHUNK, BLOCK_V], dtype, layout=layout))
            else:
                async_copy.wait_group(HEADS * CHUNKS - 1 - (head * CHUNKS + c))
            for r in gl.static_range(0, CHUNK, ROWS):
                state = tiles.index(head * CHUNKS + c).slice(r, ROWS).load(layout).to(gl.float32)
                s += state * k_shared.slice(c * CHUNK + r, ROWS).load(key_layout)[:, None]
                t += state * q_shared.slice(c * CHUNK + r, ROWS).load(key_layout)[:, None]
        s, t = gl.reduce((s, t), 0, add_pairs)
        delta = (v_shared.index(head).load(value_layout) - s * (decay * k_norm)) * beta
        out = t * (decay * q_norm) + delta * (qk * q_norm * k_norm)
        gl.store(out_ptr + head * VALUE_DIM + j, out.to(out_ptr.dtype.element_ty))
        delta = (delta * k_norm)[None, :]
        for c in gl.static_range(CHUNKS):
            chunk = tiles.index(head * CHUNKS + c)
            k_rows = k_shared.slice(c * CHUNK, CHUNK).load(key_layout)[:, None]
            state = (chunk.load(layout).to(gl.float32) * decay + k_rows * delta).to(dtype)
            if BULK:
                chunk.store(state)
                fence_async_shared()
                tma.async_copy_shared_to_global(
                    state_desc, [first_row + (head * CHUNKS + c) * CHUNK, first_value], chunk
                )
            else:
                gl.store(state_ptr + ((head * CHUNKS + c) * CHUNK * VALUE_DIM) + in_chunk, state)
    if BULK:
        tma.store_wait(0)


def constants(layout: StateLayout, staging: Staging, weight_stride_CW: tuple[int, int] | None = None) -> dict[str, Any]:
    """Compile-time parameters of :func:`shared_decode_kernel` for a layout and the conv weight's strides (contiguous where
    None)."""
    v_heads, key_dim, value_dim = layout.recurrent_shape
    k_heads = (layout.conv_channels - v_heads * value_dim) // (2 * key_dim)
    stride_c, stride_w = weight_stride_CW or (layout.conv_kernel, 1)
    return {
        "WEIGHT_STRIDE_C": stride_c,
        "WEIGHT_STRIDE_W": stride_w,
        "V_HEADS": v_heads,
        "GROUP": v_heads // k_heads,
        "HEADS": staging.heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "CHANNELS": layout.conv_channels,
        "WIDTH": layout.conv_kernel,
        "BLOCK_V": staging.block_v,
        "CHUNKS": staging.chunks,
        "ROWS": rows_at_once(staging.block_v, torch_dtype(layout.recurrent_dtype).itemsize, staging.num_warps),
        "BULK": staging.bulk,
        "DEPENDENT_LAUNCH": staging.dependent_launch,
        "SCALE": key_dim**-0.5,
        "EPS": L2NORM_EPS,
    }


def gdn_decode(
    buffer: torch.Tensor,
    layout: StateLayout,
    layer: int,
    x_BC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    a_BV: torch.Tensor,
    b_BV: torch.Tensor,
    a_log_V: torch.Tensor,
    dt_bias_V: torch.Tensor,
    state_table_BL: torch.Tensor,
    position_B: torch.Tensor,
    staging: Staging,
) -> torch.Tensor:
    """See :func:`hybridcache.kernels.gdn_decode.triton.gdn_decode`, whose results and errors these are.

    Raises:
        ValueError: :func:`why_not` has a reason.
    """
    reason = why_not(layout, x_BC, staging)
    if reason is not None:
        raise ValueError(f"GDN decode through shared memory cannot do {reason}")
    if x_BC.stride(-1) != 1 or a_BV.stride(-1) != 1 or b_BV.stride(-1) != 1:
        raise ValueError(
            f"x, a, b strides {x_BC.stride()}, {a_BV.stride()}, {b_BV.stride()}: the last dimension must be contiguous"
        )
    rows, (v_heads, key_dim, value_dim) = x_BC.shape[0], layout.recurrent_shape
    out_BVJ = torch.empty((rows, v_heads, value_dim), dtype=x_BC.dtype, device=x_BC.device)
    if rows == 0:
        return out_BVJ
    state_dtype, conv_dtype = torch_dtype(layout.recurrent_dtype), torch_dtype(layout.conv_dtype)
    # Rows of the pool are counted from this layer's base, which need not lie on a whole number of them.
    states = elements(buffer[layout.base[layer] :], state_dtype)
    constant = constants(layout, staging, (conv_weight_CW.stride(0), conv_weight_CW.stride(1)))
    grid = (value_dim // staging.block_v, v_heads // staging.heads, rows)
    shared_decode_kernel[grid](
        descriptor(states, value_dim, key_dim // staging.chunks, staging) if staging.bulk else None,
        states,
        elements(buffer, conv_dtype),
        x_BC,
        conv_weight_CW,
        a_BV,
        b_BV,
        a_log_V,
        dt_bias_V,
        state_table_BL,
        position_B,
        out_BVJ,
        layer,
        x_BC.stride(0),
        a_BV.stride(0),
        b_BV.stride(0),
        state_table_BL.stride(0),
        layout.stride // state_dtype.itemsize,
        (layout.base[layer] + layout.conv_offset) // conv_dtype.itemsize,
        layout.stride // conv_dtype.itemsize,
        **constant,
        num_warps=staging.num_warps,
        **({"launch_pdl": True} if staging.dependent_launch else {}),
    )
    return out_BVJ


def descriptor(states: torch.Tensor, value_dim: int, chunk: int, staging: Staging) -> TensorDescriptor:
    """The pool from a layer's base on, as rows of ``value_dim`` elements that bulk copies take ``chunk`` at a time."""
    dtype = getattr(gl, str(states.dtype).removeprefix("torch."))
    shape = [states.numel() // value_dim, value_dim]
    return TensorDescriptor(states, shape, [value_dim, 1], [chunk, staging.block_v], staged_layout(dtype, True))
