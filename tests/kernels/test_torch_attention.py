"""The torch backend's paged attention and block copy against loops over tokens in float64 that read bytes by the
layout's formula.

Pools are full of NaN patterns, tables are shuffled, and what an operation must not touch is compared byte for byte.
Shapes: T tokens, B rows, H query heads, K KV heads, D head dim.
"""

import random
from dataclasses import replace

import pytest
import torch
from kernel_checks import run
from torch_pools import TOLERANCE, poisoned, read

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.torch_ops.attention import GROUP_POSITIONS
from hybridcache.memory.layout import AttentionLayout
from hybridcache.spec.dtypes import torch_dtype

LAYERS = 2
HEADS_K, DIM = 2, 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def kv_layout(kind: str, dtype: str, v_dim: int = DIM) -> tuple[AttentionLayout, int]:
    """A layout and the number of table entries in its pool: block-major and layer-major as the strategies make them,
    and one whose every stride has a gap."""
    size = torch_dtype(dtype).itemsize
    k_row, v_row, kb, blocks, entries = DIM * size, v_dim * size, 8, 3, 40
    token = (HEADS_K * k_row, HEADS_K * v_row)
    kernel = kb * sum(token)
    layout = AttentionLayout(
        base=tuple(layer * kernel for layer in range(LAYERS)),
        tokens_per_entry=kb * blocks,
        kernel_block_tokens=kb,
        manager_stride=blocks * LAYERS * kernel,
        kernel_stride=LAYERS * kernel,
        kv_stride=kb * token[0],
        token_stride=token,
        head_stride=(k_row, v_row),
        num_kv_heads=HEADS_K,
        k_dim=DIM,
        v_dim=v_dim,
        dtype=dtype,
    )
    if kind == "layer_major":
        layout = replace(
            layout,
            base=tuple(layer * entries * blocks * kernel for layer in range(LAYERS)),
            manager_stride=blocks * kernel,
            kernel_stride=kernel,
        )
    if kind == "gaps":
        wide = 3 * 16 * max(k_row, v_row)
        layout = replace(
            layout,
            base=(16, 16 + 5 * kb * HEADS_K * wide),
            head_stride=(k_row + 16, v_row + 32),
            token_stride=(HEADS_K * wide, HEADS_K * wide + 16),
            kv_stride=2 * kb * HEADS_K * wide,
            kernel_stride=10 * kb * HEADS_K * wide,
            manager_stride=31 * kb * HEADS_K * wide,
        )
    return layout, entries


def kv_pool_bytes(layout: AttentionLayout, entries: int) -> int:
    """Up to the end of the last entry's last row, and not a byte further."""
    last = layout.tokens_per_entry - 1
    rows = [(kv, layout.k_dim if kv == 0 else layout.v_dim) for kv in (0, 1)]
    size = torch_dtype(layout.dtype).itemsize
    return max(
        layout.address(layer, entries - 1, last, kv, layout.num_kv_heads - 1) + dim * size
        for layer in range(LAYERS)
        for kv, dim in rows
    )


def shuffled_tables(rng: random.Random, layout: AttentionLayout, entries: int, lengths: list[int]) -> torch.Tensor:
    """Rows of distinct entries in random order; a length of 0 is a padding row."""
    free = rng.sample(range(entries), entries)
    counts = [-(-length // layout.tokens_per_entry) for length in lengths]
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return table


def fill_context(buffer, layout, layer, table, lengths, backend):
    """Store random K and V for every position of every row, through the operation itself."""
    row_T = torch.cat([torch.full((n,), b, dtype=torch.int32) for b, n in enumerate(lengths)])
    position_T = torch.cat([torch.arange(n) for n in lengths])
    k = torch.randn(len(row_T), HEADS_K, layout.k_dim, dtype=torch.float64)
    v = torch.randn(len(row_T), HEADS_K, layout.v_dim, dtype=torch.float64)
    run(backend, "kv_store", buffer, layout, layer, k, v, table, row_T, position_T)


def naive_attention(buffer, layout, layer, q_QHD, table_N, length, scale) -> torch.Tensor:
    """The row's last queries over everything up to them, rows read one by one."""
    per_kv = q_QHD.shape[1] // layout.num_kv_heads
    rows: dict[tuple[int, int], torch.Tensor] = {}
    for kv, dim in ((0, layout.k_dim), (1, layout.v_dim)):
        for head in range(layout.num_kv_heads):
            found = []
            for p in range(length):
                entry = int(table_N[p // layout.tokens_per_entry])
                found.append(read(buffer, layout.address(layer, entry, p, kv, head), dim, layout.dtype))
            rows[kv, head] = torch.stack(found)
    out = torch.empty(*q_QHD.shape[:2], layout.v_dim, dtype=torch.float64)
    for i, q_HD in enumerate(q_QHD.double()):
        seen = length - len(q_QHD) + i + 1
        for h, q in enumerate(q_HD):
            weights = (rows[0, h // per_kv][:seen] @ q * scale).softmax(0)
            out[i, h] = weights @ rows[1, h // per_kv][:seen]
    return out


@pytest.mark.parametrize("kind", ["block_major", "layer_major", "gaps"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_kv_store_writes_rows_by_the_formula_and_nothing_else(rng, kind, dtype):
    layout, entries = kv_layout(kind, dtype)
    buffer, backend = poisoned(kv_pool_bytes(layout, entries)), Backend("torch")
    lengths = [rng.randint(1, 70), 0, rng.randint(1, 70), 24]
    table = shuffled_tables(rng, layout, entries, lengths)
    tokens = [(b, p) for b, n in enumerate(lengths) for p in range(n) if rng.random() < 0.7] or [(0, 0)]
    tokens += [(1, 0), (1, 10**6)]  # of the padding row
    rng.shuffle(tokens)
    row_T = torch.tensor([b for b, _ in tokens], dtype=torch.int32)
    position_T = torch.tensor([p for _, p in tokens])
    k, v = torch.randn(2, len(tokens), HEADS_K, DIM).unbind()
    layer = rng.randrange(LAYERS)
    run(backend, "kv_store", buffer, layout, layer, k, v, table, row_T, position_T)

    expected = poisoned(buffer.numel())
    size = torch_dtype(dtype).itemsize
    for t, (b, p) in enumerate(tokens):
        if lengths[b] == 0:
            continue
        for kv, value in enumerate((k, v)):
            for head in range(HEADS_K):
                at = layout.address(layer, int(table[b, p // layout.tokens_per_entry]), p, kv, head)
                expected[at : at + DIM * size] = value[t, head].to(torch_dtype(dtype)).view(torch.uint8)
    assert torch.equal(buffer, expected)
    assert backend.launches == {"kv_store[torch]": 1}


@pytest.mark.parametrize("kind", ["block_major", "layer_major", "gaps"])
@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        ("float64", "float64"),
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
        ("bfloat16", "float8_e4m3fn"),
    ],
)
def test_decode(rng, kind, dtype, pool_dtype):
    layout, entries = kv_layout(kind, pool_dtype, v_dim=rng.choice([DIM, 16]))
    buffer, backend = poisoned(kv_pool_bytes(layout, entries)), Backend("torch")
    lengths = [1, 0, 63, 64, 65, rng.randint(130, 260), 2]
    table = shuffled_tables(rng, layout, entries, lengths)
    fill_context(buffer, layout, 1, table, lengths, backend)
    q = torch.randn(len(lengths), 6, DIM).to(torch_dtype(dtype))
    context = torch.tensor([max(n, 1) for n in lengths], dtype=torch.int32)
    before = buffer.clone()
    out = run(backend, "paged_decode", buffer, layout, 1, q, table, context, DIM**-0.5)
    assert out.dtype == q.dtype
    assert torch.equal(buffer, before)
    for b, n in enumerate(lengths):
        if n:
            expected = naive_attention(buffer, layout, 1, q[b : b + 1], table[b], n, DIM**-0.5)[0]
            torch.testing.assert_close(out[b].double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    assert backend.launches["paged_decode[torch]"] == 1


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [("float64", "float64"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")],
)
@pytest.mark.parametrize(
    "rows",
    [[(1, 1)], [(63, 63), (64, 64), (65, 65)], [(5, 70)], [(1, 129), (64, 128), (0, 0), (1, 1), (3, 200), (33, 33)]],
    ids=lambda rows: "-".join(f"{queries}of{context}" for queries, context in rows),
)
def test_prefill(rng, rows, dtype, pool_dtype):
    layout, entries = kv_layout(rng.choice(["block_major", "layer_major", "gaps"]), pool_dtype)
    buffer, backend = poisoned(kv_pool_bytes(layout, entries)), Backend("torch")
    lengths = [context for _, context in rows]
    table = shuffled_tables(rng, layout, entries, lengths)
    fill_context(buffer, layout, 0, table, lengths, backend)
    # A padding row has tokens, too: its output is of no interest, its neighbours' must not change.
    counts = [queries or 2 for queries, _ in rows]
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(sum(counts), 4, DIM).to(torch_dtype(dtype))
    context = torch.tensor([c or 2 for c in lengths], dtype=torch.int32)
    out = run(
        backend, "paged_prefill", buffer, layout, 0, q, table, offsets, context, 0.3, max(counts), max(max(lengths), 2)
    )
    for b, (queries, length) in enumerate(rows):
        if queries:
            here = slice(int(offsets[b]), int(offsets[b]) + queries)
            expected = naive_attention(buffer, layout, 0, q[here], table[b], length, 0.3)
            torch.testing.assert_close(out[here].double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
    assert out.dtype == q.dtype


def test_long_rows_are_not_padded_together(rng):
    """One long row among short ones: the gathered positions stay near the rows' own, and the result is right."""
    layout, entries = kv_layout("block_major", "float32")
    layout = replace(layout, num_kv_heads=1, head_stride=(DIM * 4, DIM * 4))
    entries = 1 + GROUP_POSITIONS // 64 // layout.tokens_per_entry + 200
    buffer, backend = poisoned(entries * layout.manager_stride), Backend("torch")
    lengths = [GROUP_POSITIONS // 64, *(rng.randint(1, 9) for _ in range(100))]
    table = shuffled_tables(rng, layout, entries, lengths)
    row_T = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    position_T = torch.cat([torch.arange(n) for n in lengths])
    k, v = torch.randn(2, len(row_T), 1, DIM).unbind()
    run(backend, "kv_store", buffer, layout, 0, k, v, table, row_T, position_T)
    q = torch.randn(len(lengths), 2, DIM)
    out = run(backend, "paged_decode", buffer, layout, 0, q, table, torch.tensor(lengths, dtype=torch.int32), 1.0)
    for b in range(len(lengths)):
        rows = row_T == b
        expected = (q[b].double() @ k[rows, 0].double().T).softmax(-1) @ v[rows, 0].double()
        torch.testing.assert_close(out[b].double(), expected, rtol=2e-5, atol=2e-5)


def test_block_copy_runs_moves_in_order(rng):
    buffer = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    expected, moves = bytearray(buffer.numpy().tobytes()), []
    for _ in range(20):
        size = rng.randint(1, 200)
        src, dst = rng.randint(0, 1800), rng.randint(2048, 3800)
        if rng.random() < 0.5:
            src, dst = dst, src
        moves.append((src, dst, size))
        expected[dst : dst + size] = expected[src : src + size]
    backend = Backend("torch")
    assert backend.block_copy(buffer, moves) == sum(size for _, _, size in moves)
    assert buffer.numpy().tobytes() == bytes(expected)
    assert backend.launches == {"block_copy[torch]": 1}
