"""The kernel of :mod:`.hopper`: a program takes a tile of 128 queries (tokens x heads of one KV head, as in ``triton.py``).

Its producer walks the manager table and copies K and V rows into a ring in shared memory; two consumers take 64 queries each
and meet only at the ring's barriers, so that the softmax of one overlaps the products of the other. Inside a consumer the
scores of the next tile are computed beside the sum over values of the last one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@constexpr_function
def copy_layout():
    """Eight threads take 128 bytes of a row: a thread works out few rows' addresses and takes many chunks of each."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@constexpr_function
def mma_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def produce(
    rings, barriers, k_ptr, v_ptr, table_row, tiles, end,
    manager_stride, kernel_stride, token_stride,
    TM: gl.constexpr, KB: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Copy the rows of every tile into the ring as its slots fall empty; zeros beyond ``end``."""
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    layout: gl.constexpr = copy_layout()
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))[None, :]
    in_tile = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    last = gl.maximum(end - 1, 0)
    # Table entries are read one tile ahead of their use.
    entry = gl.load(table_row + gl.minimum(in_tile, last) // TM)
    for tile in range(tiles):
        key = tile * BLOCK_N + in_tile
        row = entry.to(gl.int64) * manager_stride + (key % TM // KB * kernel_stride + key % KB * token_stride)
        entry = gl.load(table_row + gl.minimum(key + BLOCK_N, last) // TM)
        inside = (key < end)[:, None]
        slot = tile % SLOTS
        phase = tile // SLOTS & 1
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        async_copy.async_copy_global_to_shared(k_ring.index(slot), (k_ptr + dim) + row[:, None], inside)
        async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        async_copy.async_copy_global_to_shared(v_ring.index(slot), (v_ptr + dim) + row[:, None], inside)
        async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def softmax(score, highest, total, scale_log2, P: gl.constexpr):
    """One tile's step of the online softmax: probabilities as the next product's operand, and what to rescale by."""
    new_highest = gl.maximum(highest, gl.max(score, 1))
    p = gl.exp2(score * scale_log2 - (new_highest * scale_log2)[:, None])
    rescale = gl.exp2((highest - new_highest) * scale_log2)
    total = total * rescale + gl.sum(p, 1)
    return p.to(P), rescale, new_highest, total


@gluon.jit
def consume(
    q_half, rings, barriers, out_tile, scale_log2, tiles, unmasked, limit, valid,
    HALF: gl.constexpr, HEADS: gl.constexpr, OUT_HEADS: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries. Query ``m`` of the tile sees keys below ``limit + m // HEADS``; the tiles before ``unmasked``
    lie below ``limit``; queries from ``valid`` on don't exist."""
    k_ring, v_ring = rings
    k_full, k_empty, v_full, _ = barriers
    P: gl.constexpr = k_ring.dtype
    s_layout: gl.constexpr = mma_layout(BLOCK_N)
    o_layout: gl.constexpr = mma_layout(DIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    m = HALF * 64 + gl.arange(0, 64, layout=row_layout)
    row_limit = (limit + m // HEADS)[:, None]
    in_tile = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))[None, :]
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    acc = gl.zeros([64, DIM], gl.float32, layout=o_layout)
    highest = gl.full([64], float("-inf"), gl.float32, layout=row_layout)
    total = gl.zeros([64], gl.float32, layout=row_layout)
    fence_async_shared()

    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    score = warpgroup_mma(q_half, k_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(k_empty.index(0))
    score = gl.where(in_tile < row_limit, score, float("-inf"))
    p, rescale, highest, total = softmax(score, highest, total, scale_log2, P)
    p = gl.convert_layout(p, p_layout)

    for tile in range(1, unmasked):
        # fmt: off
        acc, p, rescale, highest, total = advance(
            tile, acc, p, rescale, highest, total, q_half, rings, barriers, zero, scale_log2, in_tile, row_limit,
            False, BLOCK_N, SLOTS,
        )
    for tile in range(gl.maximum(unmasked, 1), tiles):
        acc, p, rescale, highest, total = advance(
            tile,
            acc,
            p,
            rescale,
            highest,
            total,
            q_half,
            rings,
            barriers,
            zero,
            scale_log2,
            in_tile,
            row_limit,
            True,
            BLOCK_N,
            SLOTS,
        )
        # fmt: on

    slot = (tiles - 1) % SLOTS
    mbarrier.wait(v_full.index(slot), (tiles - 1) // SLOTS & 1)
    fence_async_shared()
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
    acc = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    out = acc / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    # Through shared memory, where the queries are no longer needed, to rows of 16-byte vectors.
    q_half.store(out.to(P))
    layout: gl.constexpr = copy_layout()
    out = q_half.load(layout)
    m = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    offset = (m // HEADS * OUT_HEADS + m % HEADS) * DIM
    gl.store(out_tile + offset[:, None] + dim[None, :], out, mask=(m < valid)[:, None])


@gluon.jit
def advance(
    tile, acc, p, rescale, highest, total, q_half, rings, barriers, zero, scale_log2, in_tile, row_limit,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Scores of ``tile`` beside the sum over values of the tile before, whose probabilities are ``p``."""
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = barriers
    slot = tile % SLOTS
    before = (tile - 1) % SLOTS
    mbarrier.wait(v_full.index(before), (tile - 1) // SLOTS & 1)
    mbarrier.wait(k_full.index(slot), tile // SLOTS & 1)
    fence_async_shared()
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    score = warpgroup_mma(q_half, k_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_ring.index(before), acc, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(k_empty.index(slot))
    if MASKED:
        score = gl.where(tile * BLOCK_N + in_tile < row_limit, score, float("-inf"))
    next_p, rescale, highest, total = softmax(score, highest, total, scale_log2, p.dtype)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(before))
    return acc, gl.convert_layout(next_p, p.type.layout), rescale, highest, total


@gluon.jit(
    do_not_specialize=["rows", "tokens", "search_steps"],
    do_not_specialize_on_alignment=["table_ptr", "cu_ptr", "length_ptr"],
)
def hopper_prefill_kernel(
    pool_ptr, q_ptr, table_ptr, cu_ptr, length_ptr, out_ptr, scale_log2, rows, tokens, search_steps,
    q_stride_t: gl.int64, q_stride_h: gl.int64, table_stride: gl.int64, base: gl.int64, manager_stride: gl.int32,
    kernel_stride: gl.int32, kv_stride: gl.int64, k_token_stride: gl.int32, k_head_stride: gl.int64,
    v_head_stride: gl.int64,
    TM: gl.constexpr, KB: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: (slots of tiles x KV heads). Row ``b`` has its slots from ``cu[b] // TOKENS + b`` on, the tokens behind the last
    row as a row of their own; a slot beyond a row's tiles does nothing."""
    TOKENS: gl.constexpr = 128 // GROUP
    kv_head = gl.program_id(0) % KV_HEADS
    slot = gl.program_id(0) // KV_HEADS

    row = 0
    beyond = rows + 1
    for _ in range(search_steps):
        middle = (row + beyond) // 2
        reached = (middle < beyond) & (gl.load(cu_ptr + gl.minimum(middle, rows)) // TOKENS + middle <= slot)
        row = gl.where(reached, middle, row)
        beyond = gl.where(reached, beyond, middle)
    live = row < rows
    begin = gl.load(cu_ptr + row)
    queries = gl.load(cu_ptr + gl.minimum(row + 1, rows))
    queries = gl.where(live, queries, tokens) - begin
    first = ((queries + TOKENS - 1) // TOKENS - 1 - (slot - begin // TOKENS - row)) * TOKENS
    if first < 0:
        return
    table_row = table_ptr + gl.minimum(row, rows - 1).to(gl.int64) * table_stride
    live = live & (gl.load(table_row) >= 0)
    length = gl.load(length_ptr + gl.minimum(row, rows - 1))
    length = gl.where(live, length, 0)

    # Queries of a padding row see one key, which the producer fills with zeros: no maximum stays at -inf.
    limit = gl.where(live, length - queries + first + 1, 1)
    end = gl.minimum(limit + TOKENS - 1, length)
    tiles = gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)
    unmasked = limit // BLOCK_N
    valid = gl.minimum(queries - first, TOKENS) * GROUP
    first_token = (begin + first).to(gl.int64)
    k_ptr = pool_ptr + (base + kv_head * k_head_stride)
    v_ptr = pool_ptr + (base + kv_stride + kv_head * v_head_stride)

    dtype: gl.constexpr = pool_ptr.dtype.element_ty
    shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], dtype)
    q_ring = gl.allocate_shared_memory(dtype, [2, 64, DIM], shared_layout)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, DIM], shared_layout)
    v_ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, DIM], shared_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        # Every thread of the producer arrives at a full slot, one of every consumer at an empty one.
        mbarrier.init(k_full.index(i), count=128)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    layout: gl.constexpr = copy_layout()
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))[None, :]
    q_tile = q_ptr + first_token * q_stride_t + (kv_head * GROUP) * q_stride_h
    for half in gl.static_range(2):
        m = half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        offset = m // GROUP * q_stride_t + m % GROUP * q_stride_h
        async_copy.async_copy_global_to_shared(q_ring.index(half), q_tile + offset[:, None] + dim, (m < valid)[:, None])
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()

    out_tile = out_ptr + (first_token * (KV_HEADS * GROUP) + kv_head * GROUP) * DIM
    rings = (k_ring, v_ring)
    barriers = (k_full, k_empty, v_full, v_empty)
    # fmt: off
    gl.warp_specialize(
        [
            (consume, (
                q_ring.index(0), rings, barriers, out_tile, scale_log2, tiles, unmasked, limit, valid,
                0, GROUP, KV_HEADS * GROUP, DIM, BLOCK_N, SLOTS,
            )),
            (consume, (
                q_ring.index(1), rings, barriers, out_tile, scale_log2, tiles, unmasked, limit, valid,
                1, GROUP, KV_HEADS * GROUP, DIM, BLOCK_N, SLOTS,
            )),
            (produce, (
                rings, barriers, k_ptr, v_ptr, table_row, tiles, end, manager_stride, kernel_stride, k_token_stride,
                TM, KB, DIM, BLOCK_N, SLOTS,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    # fmt: on
