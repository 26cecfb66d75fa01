"""GDN decode in Triton: conv, SiLU, q/k l2norm, gates, delta rule and both state updates in one launch.

A program owns one tile of value dims of one value head of one row: it reads and writes its part of the recurrent state once.
It recomputes the conv of its key head's q and k. That is safe while other programs update the ring: a step at position
``p`` reads the columns of ``p - W + 1 .. p - 1`` and writes column ``p % W`` only, and every channel of that column has one
writer (q and k: the first tile of the first value head of the key head).

The step streams the state through the chip and does little else, so what counts is how many bytes are on their way:

- All loads are issued before anything waits for one. Barriers pin that order: the assembler moves no load across one, and
  it would otherwise move the state's behind the arithmetic of the conv, which costs a second trip to memory. Whether the
  conv's few loads queue before or behind the state's many is part of the choice of tiles.
- With ``s = S^T k`` and ``t = S^T q`` of the *stored* state and unnormalised k and q, the prediction is
  ``decay |k|^-1 s`` and the output ``decay |q|^-1 t + (q . k) |q|^-1 |k|^-1 delta``: one pass over the tile yields all sums,
  and norms and gates scale them afterwards instead of standing before them.
- Few warps share a tile, so that sums over key dims stay inside a warp.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_decode import hopper
from hybridcache.kernels.gdn_decode.tiles import SharedTiles, Tiles, choose, shape_constants, why_not
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import ceil_div, power_of_2
from hybridcache.memory.layout import StateLayout


@triton.jit
def conv_loads(
    x_ptr, weight_ptr, ring_ptr, first, c, inside, position,
    WEIGHT_STRIDE_C: tl.constexpr, WEIGHT_STRIDE_W: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the causal depthwise conv of the channels ``first + c`` reads: the token's own inputs, then tuples of the weights
    and the inputs before it, from the token backwards."""
    weight_ptr += first * WEIGHT_STRIDE_C
    x = tl.load(x_ptr + first + c, mask=inside, other=0.0)
    last = weight_ptr + (WIDTH - 1) * WEIGHT_STRIDE_W
    weights = (tl.load(last + c * WEIGHT_STRIDE_C, mask=inside, other=0.0),)
    past = ()
    for back in tl.static_range(1, WIDTH):
        # Column of position - back. WIDTH keeps the dividend positive; positions before the first are masked, not read.
        column = (position + WIDTH - back) % WIDTH
        seen = inside & (position >= back)
        past = past + (tl.load(ring_ptr + column * CHANNELS + first + c, mask=seen, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        tap = weight_ptr + (WIDTH - 1 - back) * WEIGHT_STRIDE_W
        weights = weights + (tl.load(tap + c * WEIGHT_STRIDE_C, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return x, weights, past


@triton.jit
def conv_sum(x, weights, past, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """The conv of what :func:`conv_loads` has read, and SiLU."""
    acc = x.to(ACC) * weights[0].to(ACC)
    for back in tl.static_range(1, WIDTH):
        acc += past[back - 1].to(ACC) * weights[back].to(ACC)
    return acc / (1.0 + tl.exp(-acc))


@triton.jit
def add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def add_triples(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@triton.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr", "read_ptr", "write_ptr", "position_ptr"],
)
def gdn_decode_kernel(
    state_ptr, ring_ptr, x_ptr, weight_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, read_ptr, write_ptr, position_ptr,
    out_ptr, layer,
    x_stride: tl.int64, a_stride: tl.int64, b_stride: tl.int64, read_stride: tl.int64, write_stride: tl.int64,
    state_base: tl.int64, state_stride: tl.int64, ring_base: tl.int64, ring_stride: tl.int64,
    WEIGHT_STRIDE_C: tl.constexpr, WEIGHT_STRIDE_W: tl.constexpr, V_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, EVICTION: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr, CONV_FIRST: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    # What is equal for all threads goes into pointers and what is not stays below 2^31 by its range: so the compiler turns
    # the distance between a thread's accesses into immediate offsets instead of one 64-bit address each.
    first_value = tile * BLOCK_V
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    i_inside = i < KEY_DIM
    j_inside = j < (BLOCK_V if VALUE_DIM % BLOCK_V == 0 else VALUE_DIM - first_value)
    out_ptr += (row * V_HEADS + head) * VALUE_DIM + first_value

    if DEPENDENT_LAUNCH:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    position = tl.load(position_ptr + row).to(tl.int32)
    source = tl.load(read_ptr + row * read_stride + layer).to(tl.int64)
    target = tl.load(write_ptr + row * write_stride + layer).to(tl.int64)
    a = tl.load(a_ptr + row * a_stride + head).to(ACC) + tl.load(dt_bias_ptr + head).to(ACC)
    b = tl.load(b_ptr + row * b_stride + head).to(ACC)
    rate = tl.load(a_log_ptr + head).to(ACC)
    if target < 0:
        tl.store(out_ptr + j, tl.zeros([BLOCK_V], dtype=out_ptr.dtype.element_ty), mask=j_inside)
        return
    state_ptr += state_base + head * (KEY_DIM * VALUE_DIM) + first_value
    written_state_ptr = state_ptr + target * state_stride
    state_ptr += source * state_stride
    written_ring_ptr = ring_ptr + ring_base + target * ring_stride
    ring_ptr += ring_base + source * ring_stride
    x_ptr += row * x_stride

    K_CHANNELS: tl.constexpr = (V_HEADS // GROUP) * KEY_DIM
    q_channel = (head // GROUP) * KEY_DIM
    k_channel = K_CHANNELS + q_channel
    v_channel = 2 * K_CHANNELS + head * VALUE_DIM + first_value
    offset = i[:, None] * VALUE_DIM + j[None, :]
    inside = i_inside[:, None] & j_inside[None, :]
    # fmt: off
    if not CONV_FIRST:
        state = tl.load(state_ptr + offset, mask=inside & (position > 0), other=0.0, eviction_policy=EVICTION)
        tl.debug_barrier()
    x_v, w_v, past_v = conv_loads(
        x_ptr, weight_ptr, ring_ptr, v_channel, j, j_inside, position, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, CHANNELS, WIDTH
    )
    x_k, w_k, past_k = conv_loads(
        x_ptr, weight_ptr, ring_ptr, k_channel, i, i_inside, position, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, CHANNELS, WIDTH
    )
    x_q, w_q, past_q = conv_loads(
        x_ptr, weight_ptr, ring_ptr, q_channel, i, i_inside, position, WEIGHT_STRIDE_C, WEIGHT_STRIDE_W, CHANNELS, WIDTH
    )
    if CONV_FIRST:
        state = tl.load(state_ptr + offset, mask=inside & (position > 0), other=0.0, eviction_policy=EVICTION)
    # fmt: on
    tl.debug_barrier()
    column = written_ring_ptr + (position % WIDTH) * CHANNELS
    writes_qk = i_inside & (tile == 0) & (head % GROUP == 0)
    tl.store(column + q_channel + i, x_q, mask=writes_qk)
    tl.store(column + k_channel + i, x_k, mask=writes_qk)
    tl.store(column + v_channel + j, x_v, mask=j_inside)
    if source != target:
        for back in tl.static_range(1, WIDTH):
            column = written_ring_ptr + ((position + WIDTH - back) % WIDTH) * CHANNELS
            seen = position >= back
            tl.store(column + q_channel + i, past_q[back - 1], mask=writes_qk & seen)
            tl.store(column + k_channel + i, past_k[back - 1], mask=writes_qk & seen)
            tl.store(column + v_channel + j, past_v[back - 1], mask=j_inside & seen)
    q = conv_sum(x_q, w_q, past_q, WIDTH, ACC)
    k = conv_sum(x_k, w_k, past_k, WIDTH, ACC)
    v = conv_sum(x_v, w_v, past_v, WIDTH, ACC)

    softplus = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    decay = tl.exp(-tl.exp(rate) * softplus)
    beta = 1.0 / (1.0 + tl.exp(-b))
    qq, kk, qk = tl.reduce((q * q, k * k, q * k), 0, add_triples)
    q_norm = tl.rsqrt(qq + EPS) * SCALE
    k_norm = tl.rsqrt(kk + EPS)

    wide = state.to(ACC)
    s, t = tl.reduce((wide * k[:, None], wide * q[:, None]), 0, add_pairs)
    delta = (v - s * (decay * k_norm)) * beta
    tl.store(out_ptr + j, t * (decay * q_norm) + delta * (qk * q_norm * k_norm), mask=j_inside)
    state = state.to(ACC) * decay + k[:, None] * (delta * k_norm)[None, :]
    tl.store(written_state_ptr + offset, state, mask=inside, eviction_policy=EVICTION)


def constants(
    layout: StateLayout, dtype: torch.dtype, tiles: Tiles, weight_stride_CW: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Compile-time parameters of :func:`gdn_decode_kernel` for a layout, an activation dtype and the conv weight's strides
    (contiguous where None)."""
    _, key_dim, value_dim = layout.recurrent_shape
    return {
        **shape_constants(layout, tiles, weight_stride_CW),
        "BLOCK_K": power_of_2(key_dim),
        "BLOCK_V": min(power_of_2(value_dim), tiles.block_v),
        "CONV_FIRST": tiles.conv_first,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def options(tiles: Tiles | SharedTiles) -> dict[str, Any]:
    """Launch options."""
    chosen: dict[str, Any] = {"num_warps": tiles.num_warps}
    if isinstance(tiles, Tiles) and tiles.max_registers:
        chosen["maxnreg"] = tiles.max_registers
    if tiles.dependent_launch:
        chosen["launch_pdl"] = True
    return chosen


def gdn_decode(
    cache: StateCache, x_BC: Tensor, conv_weight_CW: Tensor, a_BV: Tensor, b_BV: Tensor, a_log_V: Tensor,
    dt_bias_V: Tensor, state_read_BL: Tensor, state_write_BL: Tensor, position_B: Tensor,
    tiles: Tiles | SharedTiles | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`.StateOperations.gdn_decode`. Inputs may be slices whose last dimension has stride 1. The conv weight may have
    any strides: a ``[W, C]`` tensor's ``.t()`` loads as vectors, so it is the faster one, and neither order is copied.

    Args:
        tiles: a :class:`SharedTiles` takes the kernel of ``hopper.py``;
            :func:`~hybridcache.kernels.gdn_decode.tiles.choose` decides where None.

    Raises:
        ValueError: a last dimension is not contiguous, or the kernel of ``hopper.py`` cannot do the shape.
    """
    layout, strides = cache.layout, (conv_weight_CW.stride(0), conv_weight_CW.stride(1))
    tiles = tiles or choose(layout, x_BC)
    if x_BC.stride(-1) != 1 or a_BV.stride(-1) != 1 or b_BV.stride(-1) != 1:
        raise ValueError(
            f"x, a, b strides {x_BC.stride()}, {a_BV.stride()}, {b_BV.stride()}: the last dimension must be contiguous"
        )
    if isinstance(tiles, SharedTiles):
        reason = why_not(layout, x_BC.dtype, tiles)
        if reason is not None:
            raise ValueError(f"GDN decode through shared memory cannot do {reason}")
        kernel, constant = hopper.shared_decode_kernel, hopper.constants(layout, tiles, strides)
    else:
        kernel, constant = gdn_decode_kernel, constants(layout, x_BC.dtype, tiles, strides)
    rows, (v_heads, _, value_dim) = x_BC.shape[0], layout.recurrent_shape
    out_BVJ = torch.empty((rows, v_heads, value_dim), dtype=x_BC.dtype, device=x_BC.device)
    if rows == 0:
        return out_BVJ
    launcher(kernel)[(ceil_div(value_dim, constant["BLOCK_V"]), v_heads, rows)](
        cache.state, cache.ring, x_BC, conv_weight_CW, a_BV, b_BV, a_log_V, dt_bias_V, state_read_BL, state_write_BL,
        position_B, out_BVJ, cache.layer, x_BC.stride(0), a_BV.stride(0), b_BV.stride(0), state_read_BL.stride(0),
        state_write_BL.stride(0), *cache.state_place, *cache.ring_place,
        **constant, **options(tiles),
    )  # fmt: skip
    return out_BVJ
