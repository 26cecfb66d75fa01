"""GDN prefill's launch over states for Hopper in Gluon: what :mod:`.triton_state` does, its products beside one another.

One warp copies; a group of four carries 64 value dims of a value head through all chunks of a row, in registers. A chunk's
product that needs no result of this chunk (``q S``) fills the matrix unit while others' results are worked on, and the
output of one chunk leaves while the next one's first product runs. 16-bit types, chunks of 64.

Names as in :mod:`hybridcache.kernels.gdn_prefill.triton`.
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hybridcache.kernels.gdn_prefill.triton_gates import FROM_START, ROWS_OF_GATES

TILE: gl.constexpr = gl.constexpr(64)
"""Slots of a chunk, and value dims of a program."""
GATES: gl.constexpr = gl.constexpr(2)
"""Rows of gates that are copied at once: ``FROM_START`` and, behind it, ``TO_END``."""
SOLVE, SCORE, VALUES = (gl.constexpr(i) for i in range(3))
"""Square tiles of a stage by number."""
TILES: gl.constexpr = gl.constexpr(3)


BEYOND: gl.constexpr = gl.constexpr(1 << 30)
"""A token that no tensor holds."""

REGISTERS = 240
"""Per thread at the start: all that two groups of four warps (the copying warp counts as one) can have."""


@constexpr_function
def tile_layout(dtype):
    return gl.NVMMASharedLayout.get_default_for([64, 64], dtype)


@constexpr_function
def gate_layout():
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@constexpr_function
def mma_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def copy_chunks(
    keys_queries, tiles, gates, full, empty, key_desc, value_desc, solve_desc, score_desc, gates_desc, first_chunk,
    chunks, head, k_channel, q_channel, v_channel,
    V_HEADS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring chunk after chunk into the stages as they fall empty."""
    BYTES: gl.constexpr = (TILES * TILE + 2 * BLOCK_K) * TILE * 2 + GATES * TILE * 4
    for n in range(chunks):
        stage = n % STAGES
        token = (first_chunk + n) * TILE
        square = ((first_chunk + n) * V_HEADS + head) * TILE
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), n // STAGES & 1 ^ 1)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(key_desc, [token, k_channel], bar, keys_queries.index(2 * stage))
        tma.async_copy_global_to_shared(value_desc, [token, v_channel], bar, tiles.index(stage * TILES + VALUES))
        tma.async_copy_global_to_shared(
            gates_desc, [square * ROWS_OF_GATES + FROM_START * TILE], bar, gates.index(stage)
        )
        tma.async_copy_global_to_shared(solve_desc, [square, 0], bar, tiles.index(stage * TILES + SOLVE))
        tma.async_copy_global_to_shared(key_desc, [token, q_channel], bar, keys_queries.index(2 * stage + 1))
        tma.async_copy_global_to_shared(score_desc, [square, 0], bar, tiles.index(stage * TILES + SCORE))


@gluon.jit
def store_whole(out, out_tile, out_desc, token, column):
    """Output ``[value dim, slot]`` of a chunk whose slots all hold tokens, slot 0 the token ``token``."""
    # The tile's last copy must have read it.
    tma.store_wait(0)
    out_tile.permute((1, 0)).store(out)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [token, column], out_tile)


@gluon.jit
def store_part(out, out_ptr, token, column, begin, end, OUT_STRIDE: gl.constexpr):
    """Output of a chunk for those of its slots whose tokens lie between ``begin`` and ``end``."""
    layout: gl.constexpr = out.type.layout
    slot = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))
    j = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout)).to(gl.int64)
    out_ptr += token.to(gl.int64) * OUT_STRIDE + column
    at = (out_ptr + j)[:, None] + (slot.to(gl.int64) * OUT_STRIDE)[None, :]
    valid = (token + slot >= begin) & (token + slot < end)
    gl.store(at, out, mask=valid[None, :])


@gluon.jit
def stored_tile(state_ptr, j0, BLOCK_K: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Addresses of 64 value dims (from ``j0`` on) x all key dims of a stored head, and which of them exist."""
    layout: gl.constexpr = mma_layout(BLOCK_K)
    j = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout)).to(gl.int64)
    i = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    return (state_ptr + j0 + j)[:, None] + (i.to(gl.int64) * VALUE_DIM)[None, :], (i < KEY_DIM)[None, :]


@gluon.jit
def carry(
    keys_queries, tiles, gates, full, empty, out_tile, out_desc, out_ptr, gates_ptr, state_ptr, read_ptr, write_ptr,
    checkpoint_ptr,
    checkpoint_stride_n, state_stride, first_chunk, chunks, begin, end, start, interval, checkpoints, head, j0,
    V_HEADS: gl.constexpr, BLOCK_K: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    CHECKPOINTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Carry ``[value dims from j0 on, key dims]`` of a state through a row's chunks."""
    DTYPE: gl.constexpr = tiles.dtype
    layout: gl.constexpr = mma_layout(TILE)
    left_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    OUT_STRIDE: gl.constexpr = V_HEADS * VALUE_DIM
    column = head * VALUE_DIM + j0

    entry = gl.load(read_ptr).to(gl.int64)
    at, inside = stored_tile(state_ptr + entry * state_stride, j0, BLOCK_K, KEY_DIM, VALUE_DIM)
    state = gl.load(at, mask=inside & (start > 0), other=0.0).to(gl.float32)

    token0 = begin - start % TILE
    # A chunk's decay is that of its last slot, read one chunk ahead.
    gates_ptr += head * (ROWS_OF_GATES * TILE) + FROM_START * TILE + TILE - 1
    GATES_STRIDE: gl.constexpr = V_HEADS * ROWS_OF_GATES * TILE
    next_decay = gl.load(gates_ptr + (first_chunk + gl.minimum(1, chunks - 1)) * GATES_STRIDE)
    rank = 0
    due = begin - start + (start // interval + 1) * interval if CHECKPOINTS else 0

    # What goes from chunk to chunk comes from no product itself: the assembler would wait for all products before its use.
    zero = gl.zeros([TILE, TILE], gl.float32, layout=layout)
    out_done = zero.to(DTYPE)
    left = gl.convert_layout(state.to(DTYPE), left_layout)
    state *= gl.load(gates_ptr + first_chunk * GATES_STRIDE)
    for n in range(chunks):
        stage = n % STAGES
        token = token0 + n * TILE
        last = n + 1 == chunks
        decay = gl.where(last, 1.0, next_decay)
        next_decay = gl.load(gates_ptr + (first_chunk + gl.minimum(n + 2, chunks - 1)) * GATES_STRIDE)
        mbarrier.wait(full.index(stage), n // STAGES & 1)
        keys = keys_queries.index(2 * stage)
        queries = keys_queries.index(2 * stage + 1)
        solve = tiles.index(stage * TILES + SOLVE)
        score = tiles.index(stage * TILES + SCORE)

        seen = warpgroup_mma(left, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
        # The last chunk's output leaves meanwhile. No branch may come between products; what lies beyond the tensor is not
        # written.
        whole = (n > 0) & (token - TILE >= begin)
        store_whole(out_done, out_tile, out_desc, gl.where(whole, token - TILE, BEYOND), column)
        out = warpgroup_mma(left, queries.permute((1, 0)), zero, use_acc=False, is_async=True)
        gate = gates.index(stage)
        from_start = gate.slice(0, TILE).load(columns)
        to_end = gate.slice(TILE, TILE).load(columns)
        value = tiles.index(stage * TILES + VALUES).permute((1, 0)).load(layout).to(gl.float32)
        seen = warpgroup_mma_wait(1, deps=[seen])
        difference = gl.convert_layout((value - seen * from_start[None, :]).to(DTYPE), left_layout)
        new = warpgroup_mma(difference, solve.permute((1, 0)), zero, use_acc=False, is_async=True)
        # Operands in registers stay there until their product is done.
        out, left = warpgroup_mma_wait(1, deps=[out, left])
        out *= from_start[None, :]
        new, difference = warpgroup_mma_wait(0, deps=[new, difference])
        carried = gl.convert_layout((new * to_end[None, :]).to(DTYPE), left_layout)
        state = warpgroup_mma(carried, keys, state, is_async=True)
        written = gl.convert_layout(new.to(DTYPE), left_layout)
        out = warpgroup_mma(written, score.permute((1, 0)), out, is_async=True)
        if CHECKPOINTS:
            state, out, carried, written = warpgroup_mma_wait(0, deps=[state, out, carried, written])
            if (token + TILE == due) & (due <= end) & (rank < checkpoints):
                kept = gl.load(checkpoint_ptr + rank * checkpoint_stride_n).to(gl.int64)
                at, inside = stored_tile(state_ptr + kept * state_stride, j0, BLOCK_K, KEY_DIM, VALUE_DIM)
                gl.store(at, state.to(state_ptr.dtype.element_ty), mask=inside & (kept >= 0))
                rank += 1
                due += interval
        else:
            state, carried = warpgroup_mma_wait(1, deps=[state, carried])
        left = gl.convert_layout(state.to(DTYPE), left_layout)
        state *= decay
        if not CHECKPOINTS:
            out, written = warpgroup_mma_wait(0, deps=[out, written])
        out_done = out.to(DTYPE)
        mbarrier.arrive(empty.index(stage))
        if token < begin:
            store_part(out_done, out_ptr, token, column, begin, end, OUT_STRIDE)
    token = token0 + (chunks - 1) * TILE
    if (token >= begin) & (token + TILE <= end):
        store_whole(out_done, out_tile, out_desc, token, column)
    else:
        store_part(out_done, out_ptr, token, column, begin, end, OUT_STRIDE)
    # Read here, so that the addresses need no registers during the loop.
    entry = gl.load(write_ptr).to(gl.int64)
    at, inside = stored_tile(state_ptr + entry * state_stride, j0, BLOCK_K, KEY_DIM, VALUE_DIM)
    gl.store(at, state.to(state_ptr.dtype.element_ty), mask=inside)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["layer", "interval", "checkpoints"],
    do_not_specialize_on_alignment=["first_ptr", "cu_ptr", "start_ptr", "read_ptr", "write_ptr", "checkpoint_ptr"],
)
def hopper_state_kernel(
    out_ptr, state_ptr, key_desc, value_desc, solve_desc, score_desc, gates_desc, out_desc, gates_ptr, first_ptr,
    read_ptr, write_ptr, checkpoint_ptr, cu_ptr, start_ptr, layer, interval, checkpoints,
    read_stride: gl.int64, write_stride: gl.int64, checkpoint_stride_b: gl.int64, checkpoint_stride_n: gl.int64,
    state_base: gl.int64, state_stride: gl.int64,
    K_HEADS: gl.constexpr, V_HEADS: gl.constexpr, KEY_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_K: gl.constexpr,
    HEAD_V: gl.constexpr, CHECKPOINTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A program carries 64 value dims of one value head of one row; arguments as ``state_kernel``'s."""
    tile = gl.program_id(0)
    head = gl.program_id(1)
    row = gl.program_id(2)
    read_ptr += row * read_stride + layer
    write_ptr += row * write_stride + layer
    begin = gl.load(cu_ptr + row).to(gl.int32)
    end = gl.load(cu_ptr + row + 1).to(gl.int32)
    start = gl.load(start_ptr + row).to(gl.int32)
    if (gl.load(write_ptr) < 0) | (end <= begin):
        return
    first_chunk = gl.load(first_ptr + row)
    chunks = (end - begin + start % TILE + TILE - 1) // TILE
    q_channel = head // (V_HEADS // K_HEADS) * BLOCK_K
    k_channel = q_channel + K_HEADS * BLOCK_K
    j0 = tile * TILE
    v_channel = 2 * K_HEADS * BLOCK_K + head * HEAD_V + j0
    state_ptr += state_base + head * (KEY_DIM * VALUE_DIM)
    checkpoint_ptr += row * checkpoint_stride_b + layer

    dtype: gl.constexpr = out_ptr.dtype.element_ty
    keys_queries = gl.allocate_shared_memory(dtype, [2 * STAGES, TILE, BLOCK_K], tile_layout(dtype))
    tiles = gl.allocate_shared_memory(dtype, [STAGES * TILES, TILE, TILE], tile_layout(dtype))
    gates = gl.allocate_shared_memory(gl.float32, [STAGES, GATES * TILE], gate_layout())
    out_tile = gl.allocate_shared_memory(dtype, [TILE, TILE], tile_layout(dtype))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()

    # fmt: off
    gl.warp_specialize(
        [
            (carry, (
                keys_queries, tiles, gates, full, empty, out_tile, out_desc, out_ptr, gates_ptr, state_ptr, read_ptr,
                write_ptr, checkpoint_ptr, checkpoint_stride_n, state_stride, first_chunk, chunks, begin, end, start, interval,
                checkpoints, head, j0, V_HEADS, BLOCK_K, KEY_DIM, VALUE_DIM, CHECKPOINTS, STAGES,
            )),
            (copy_chunks, (
                keys_queries, tiles, gates, full, empty, key_desc, value_desc, solve_desc, score_desc, gates_desc,
                first_chunk, chunks, head, k_channel, q_channel, v_channel, V_HEADS, BLOCK_K, STAGES,
            )),
        ],
        [1],
        [24],
    )
    # fmt: on


def descriptors(
    y: Tensor, solve: Tensor, score: Tensor, gates: Tensor, out_TVJ: Tensor, block_k: int
) -> dict[str, TensorDescriptor]:
    """The kernel's tensor descriptors by parameter."""
    tile = TILE.value
    square, row = _shared_layouts(y.dtype)

    def tiled(tensor: Tensor, columns: int = tile) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, [tile, columns], square)

    return {
        "key_desc": tiled(y, block_k), "value_desc": tiled(y), "solve_desc": tiled(solve), "score_desc": tiled(score),
        "gates_desc": TensorDescriptor.from_tensor(gates, [GATES.value * tile], row),
        "out_desc": tiled(out_TVJ.flatten(1)),
    }  # fmt: skip


@lru_cache
def _shared_layouts(dtype: torch.dtype) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """Of a square tile, and of a row of gates, in shared memory."""
    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    square = gl.NVMMASharedLayout.get_default_for([TILE.value, TILE.value], element)
    return square, gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
