"""Triton kernels on CUDA at the shapes of Qwen3-Next against float64 references, with new random inputs every time."""

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from kernel_checks import Functions, block_errors, run, state_error

    from hybridcache.kernels.backend import make_backend
    from hybridcache.kernels.block_copy import naive as naive_copy
    from hybridcache.kernels.gdn_decode import naive as naive_gdn
    from hybridcache.kernels.gdn_prefill import naive as naive_gdn_prefill
    from hybridcache.kernels.gdn_prefill.testing import prefill_case
    from hybridcache.kernels.kv_store import naive as naive_store
    from hybridcache.kernels.paged_decode import naive as naive_decode
    from hybridcache.kernels.paged_decode.tiles import Tiles
    from hybridcache.kernels.paged_decode.triton import paged_decode
    from hybridcache.kernels.paged_prefill import naive as naive_prefill
    from hybridcache.kernels.testing import attention_case, cached, normal, poisoned, rel_error, state_case

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
LARGE_POOL = 10 << 30
"""Bytes: beyond 2^31 elements of every type up to float32, and beyond 2^32 bytes."""
HEADS, KV_HEADS, DIM = 16, 2, 256
BLOCK_MAJOR = [("block_major", kb, 11) for kb in (8, 16, 32, 64)]
LAYER_MAJOR = [("layer_major", 1056, 1)]


@pytest.fixture
def generator() -> "torch.Generator":
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def backend():
    """The backend; what a test's pool took is given back after it."""
    yield make_backend("triton", "cuda")
    torch.cuda.empty_cache()


def draw(generator, low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


# -- GDN decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 8, 64, 257])
@pytest.mark.parametrize(
    ("order", "dtype", "state_dtype"),
    [
        ("block_major", "bfloat16", "float32"),
        ("layer_major", "bfloat16", "bfloat16"),
        ("block_major", "float32", "float32"),
    ],
)
def test_gdn_decode(backend, generator, rows, order, dtype, state_dtype):
    positions = [5] if rows == 1 else [0, 1, 2, 3, -1, *draw(generator, -1, 9000, rows - 5)]
    case = state_case(
        generator,
        positions=positions,
        order=order,
        state_dtype=state_dtype,
        dtype=dtype,
        conv_dtype=dtype,
        device="cuda",
    )
    expected_buffer = case.buffer.clone()
    expected = naive_gdn.gdn_decode(*cached(expected_buffer, *case.step(1)))
    out = run(backend, "gdn_decode", case.buffer, *case.step(1))
    assert rel_error(out, expected) <= TOLERANCE[dtype]
    assert state_error(case, expected_buffer, 1) <= TOLERANCE[state_dtype]
    assert sum(backend.launches.values()) == 1
    assert not any("[torch]" in name for name in backend.launches)


def test_gdn_decode_is_deterministic_beside_its_own_ring_writes(backend, generator):
    """Value tiles that raced on the ring would change the bits between runs."""
    case = state_case(generator, positions=draw(generator, 0, 50, 64), device="cuda")
    before = case.buffer.clone()
    first = run(backend, "gdn_decode", case.buffer, *case.step(0))
    after = case.buffer.clone()
    for _ in range(20):
        case.buffer.copy_(before)
        assert torch.equal(run(backend, "gdn_decode", case.buffer, *case.step(0)), first)
        assert torch.equal(case.buffer, after)


def test_gdn_decode_beyond_2_31_elements(backend, generator):
    case = state_case(generator, positions=[9, 0, 4000], device="cuda", pool_bytes=LARGE_POOL)
    assert int(case.state_write_BL[0, 0]) * (case.layout.stride // 4) > 1 << 31
    expected_buffer = case.buffer.clone()
    expected = naive_gdn.gdn_decode(*cached(expected_buffer, *case.step(0)))
    out = run(backend, "gdn_decode", case.buffer, *case.step(0))
    assert rel_error(out, expected) <= 1e-2
    assert state_error(case, expected_buffer, 0) <= 1e-5


# -- Paged decode --------------------------------------------------------------------------------------------------------


def paged_case(generator, lengths, order, kb, blocks, **options):
    """Twelve layers, as Qwen3-Next has; only layer 7 holds anything but poison."""
    return attention_case(
        generator,
        lengths=lengths,
        order=order,
        layers=12,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=KV_HEADS,
        k_dim=DIM,
        v_dim=DIM,
        device="cuda",
        fill=(7,),
        **options,
    )


def check_paged_decode(backend, generator, case, dtype="bfloat16"):
    rows = len(case.lengths)
    q_BHD = normal(generator, (rows, HEADS, DIM), case.buffer.device, dtype)
    inputs = (case.layout, 7, q_BHD, case.kv_table_BN, case.context_len_B, DIM**-0.5)
    expected = naive_decode.paged_decode(*cached(case.buffer, *inputs))
    out = run(backend, "paged_decode", case.buffer, *inputs)
    assert out.dtype == q_BHD.dtype
    padding = torch.tensor([length == 0 for length in case.lengths], device="cuda")
    assert (out[padding] == 0).all()
    for row in range(rows):
        if case.lengths[row]:
            assert rel_error(out[row], expected[row]) <= TOLERANCE[dtype], f"row {row} of {case.lengths[row]} tokens"


@pytest.mark.parametrize(("order", "kb", "blocks"), BLOCK_MAJOR + LAYER_MAJOR)
def test_paged_decode(backend, generator, order, kb, blocks):
    lengths = [1, 63, 64, 65, 8191, 0, 4097, kb * blocks]
    check_paged_decode(backend, generator, paged_case(generator, lengths, order, kb, blocks))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 8191])
def test_paged_decode_of_one_row(backend, generator, length):
    check_paged_decode(backend, generator, paged_case(generator, [length], "block_major", 8, 11))


@pytest.mark.parametrize(("order", "kb", "blocks"), [BLOCK_MAJOR[0], *LAYER_MAJOR])
@pytest.mark.parametrize(("rows", "longest"), [(64, 4000), (257, 1000)])
def test_paged_decode_of_many_rows(backend, generator, order, kb, blocks, rows, longest):
    lengths = [0, 1, 8191, *draw(generator, 0, longest, rows - 3)]
    check_paged_decode(backend, generator, paged_case(generator, lengths, order, kb, blocks))


def test_paged_decode_of_singly_allotted_kernel_blocks(backend, generator):
    check_paged_decode(backend, generator, paged_case(generator, [1, 0, 1000, 77], "block_major", 8, 1))


def test_paged_decode_in_float32(backend, generator):
    case = paged_case(generator, [1, 0, 1000, 77], "block_major", 8, 11, dtype="float32")
    check_paged_decode(backend, generator, case, "float32")


def test_paged_decode_of_float8_kv(backend, generator):
    case = paged_case(generator, [1, 0, 1000, 77], "block_major", 16, 11, dtype="float8_e4m3fn")
    check_paged_decode(backend, generator, case)


@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 8, 8), (128, 24, 2), (80, 10, 5)])
def test_paged_decode_of_other_shapes(backend, generator, dim, heads, kv_heads):
    case = attention_case(
        generator, lengths=[1, 0, 300, 1025], kv_heads=kv_heads, k_dim=dim, v_dim=dim, device="cuda", fill=(1,)
    )
    q_BHD = normal(generator, (4, heads, dim), case.buffer.device, "bfloat16")
    inputs = (case.layout, 1, q_BHD, case.kv_table_BN, case.context_len_B, dim**-0.5)
    expected = naive_decode.paged_decode(*cached(case.buffer, *inputs))
    assert rel_error(run(backend, "paged_decode", case.buffer, *inputs), expected) <= 1e-2


@pytest.mark.parametrize("tiles", [(64, 4, 3, 1), (64, 8, 3, 1), (32, 4, 4, 1), (16, 4, 3, 4), (16, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 7, 66, 128])
def test_paged_decode_tiles(generator, tiles, splits):
    lengths = [1, 0, 63, 64, 65, 16 * splits, 64 * splits, 64 * splits + 1, 5000]
    case = paged_case(generator, lengths, "block_major", 8, 11)

    tuned = Functions(paged_decode=partial(paged_decode, num_splits=splits, tiles=Tiles(*tiles)))
    check_paged_decode(tuned, generator, case)


def test_a_reduction_waits_for_every_split(generator):
    """It is set up while the splits still run: whatever it read too early would be the step before's, or poison. Every
    step's queries are the output of the step before, and a few keys decide each output, so that no two steps are alike."""
    case = paged_case(generator, [4000, 20_000], "block_major", 8, 11)
    first_BHD = normal(generator, (2, HEADS, DIM), case.buffer.device, "bfloat16")

    def steps(tiles, after=lambda: None):
        outs = [first_BHD]
        for _ in range(40):
            inputs = (case.layout, 7, outs[-1], case.kv_table_BN, case.context_len_B, 1.0)
            outs.append(paged_decode(*cached(case.buffer, *inputs), tiles=tiles))
            after()
        return outs[1:]

    tiles = Tiles(64, 4, 3, 1)
    alone, eager = steps(replace(tiles, dependent_launch=False), torch.cuda.synchronize), steps(tiles)
    for found, expected in zip(eager, alone):
        assert torch.equal(found, expected)
    assert not any(torch.equal(one, other) for one, other in pairwise(alone))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together = steps(tiles)
    for _ in range(3):
        for out in together:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(together, alone):
            assert torch.equal(found, expected)


def test_paged_decode_reads_the_pool_at_each_call(backend, generator):
    """Poison in one row of a live request shows in its output and in no other's."""
    case = paged_case(generator, [500, 500], "block_major", 8, 11)
    q_BHD = normal(generator, (2, HEADS, DIM), case.buffer.device, "bfloat16")
    inputs = (case.layout, 7, q_BHD, case.kv_table_BN, case.context_len_B, DIM**-0.5)
    assert run(backend, "paged_decode", case.buffer, *inputs).isfinite().all()
    address = case.layout.address(7, int(case.kv_table_BN[1, 499 // 88]), 499, 1, 0)
    case.buffer[address : address + 2 * DIM] = 0xFF
    out = run(backend, "paged_decode", case.buffer, *inputs)
    assert out[0].isfinite().all()
    assert out[1, : HEADS // 2].isnan().all()
    assert out[1, HEADS // 2 :].isfinite().all()


# -- KV store and block copy ---------------------------------------------------------------------------------------------


def check_kv_store(backend, generator, case):
    tokens = [(row, position) for row, length in enumerate(case.lengths) for position in range(length)]
    tokens.insert(1, (case.lengths.index(0), 1 << 20))
    row_T = torch.tensor([row for row, _ in tokens], dtype=torch.int32, device="cuda")
    position_T = torch.tensor([position for _, position in tokens], device="cuda")
    k_TKD = normal(generator, (len(tokens), KV_HEADS, DIM), case.buffer.device, "bfloat16")
    v_TKD = normal(generator, (len(tokens), KV_HEADS, DIM), case.buffer.device, "bfloat16")
    case.buffer.fill_(0xFF)
    expected_buffer = case.buffer.clone()
    inputs = (case.layout, 7, k_TKD, v_TKD, case.kv_table_BN, row_T, position_T)
    naive_store.kv_store(*cached(expected_buffer, *inputs))
    run(backend, "kv_store", case.buffer, *inputs)
    assert torch.equal(case.buffer, expected_buffer)
    assert backend.launches == {"kv_store[triton]": 1}


@pytest.mark.parametrize(("order", "kb", "blocks"), [BLOCK_MAJOR[0], *LAYER_MAJOR])
def test_kv_store(backend, generator, order, kb, blocks):
    check_kv_store(backend, generator, paged_case(generator, [1, 0, 300, 1057], order, kb, blocks))


def test_kv_store_and_decode_beyond_2_31_elements(backend, generator):
    case = paged_case(generator, [100, 0, 200], "block_major", 8, 11, pool_bytes=LARGE_POOL)
    assert int(case.kv_table_BN[0, 0]) * (case.layout.manager_stride // 2) > 1 << 32
    check_paged_decode(backend, generator, case)
    check_kv_store(make_backend("triton", "cuda"), generator, case)


@pytest.mark.parametrize("granule", [1, 16, 4096])
def test_block_copy(backend, generator, granule):
    cells = 512
    buffer = torch.randint(256, (cells * granule,), dtype=torch.uint8, device="cuda")
    expected = buffer.clone()
    moves = []
    while len(moves) < 300:
        src, dst, length = draw(generator, 0, cells, 3)
        length = min(length % 9, abs(src - dst), cells - max(src, dst))
        moves.append((src * granule, dst * granule, length * granule))
    assert backend.block_copy(buffer, moves) == naive_copy.block_copy(expected, moves)
    assert torch.equal(buffer, expected), moves


def test_block_copy_beyond_2_32_bytes(backend, generator):
    buffer, block = poisoned(LARGE_POOL, "cuda"), 2_162_688
    last = LARGE_POOL // block - 1
    source = normal(generator, (block // 4,), buffer.device, "float32").view(torch.uint8)
    buffer[last * block : (last + 1) * block] = source
    assert backend.block_copy(buffer, [(last * block, 0, block), (0, (last - 1) * block, block)]) == 2 * block
    assert torch.equal(buffer[:block], source)
    assert torch.equal(buffer[(last - 1) * block : last * block], source)
    assert (buffer[block : 2 * block] == 0xFF).all()


# -- The backend ---------------------------------------------------------------------------------------------------------


def test_decode_operations_replay_in_a_cuda_graph(backend, generator):
    """Capture once with padding rows; replays see new inputs, lengths, positions and table entries."""
    lengths = [120, 0, 700, 64]
    kv = paged_case(generator, lengths, "block_major", 8, 11)
    state = state_case(generator, positions=[119, -1, 699, 63], device="cuda")
    rows, device = len(lengths), kv.buffer.device
    q_BHD, k_BKD, v_BKD = (normal(generator, (rows, heads, DIM), device, "bfloat16") for heads in (16, 2, 2))
    row_B = torch.arange(rows, dtype=torch.int32, device=device)
    position_B = kv.context_len_B.long() - 1

    def step(operations, state_buffer, kv_buffer):
        out = run(operations, "gdn_decode", state_buffer, *state.step(1))
        run(operations, "kv_store", kv_buffer, kv.layout, 7, k_BKD, v_BKD, kv.kv_table_BN, row_B, position_B)
        attended = run(
            operations, "paged_decode", kv_buffer, kv.layout, 7, q_BHD, kv.kv_table_BN, kv.context_len_B, DIM**-0.5
        )
        return out, attended

    reference = Functions(
        gdn_decode=naive_gdn.gdn_decode, kv_store=naive_store.kv_store, paged_decode=naive_decode.paged_decode
    )
    scratch = state.buffer.clone(), kv.buffer.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(backend, *scratch)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(backend, state.buffer, kv.buffer)

    for _ in range(3):
        for tensor in (state.x_BC, state.a_BV, state.b_BV, q_BHD, k_BKD, v_BKD):
            tensor.copy_(torch.randn_like(tensor))
        expected_buffers = state.buffer.clone(), kv.buffer.clone()
        expected = step(reference, *expected_buffers)
        graph.replay()
        torch.cuda.synchronize()
        for out, wanted in zip(captured, expected):
            assert rel_error(out, wanted) <= 1e-2
        assert torch.equal(kv.buffer, expected_buffers[1])
        # The next step, one token more: no request crosses into a block that its table lacks.
        state.position_B += 1
        position_B += 1
        kv.context_len_B += 1
    assert (captured[0][1] == 0).all()
    assert (captured[1][1] == 0).all()


def hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gdn_prefill(backend, generator, dtype):
    options = {"dtype": dtype, "conv_dtype": dtype, "device": "cuda"}
    case = prefill_case(generator, lengths=[40, 3, 70, 129], starts=[0, -1, 100, 63], tail=5, **options)
    expected_buffer = case.buffer.clone()
    expected = naive_gdn_prefill.gdn_prefill(*cached(expected_buffer, *case.step(1)))
    assert rel_error(run(backend, "gdn_prefill", case.buffer, *case.step(1)), expected) <= TOLERANCE[dtype]
    error, rings = block_errors(case, expected_buffer, 1)
    assert error <= TOLERANCE[dtype]
    assert rings
    assert torch.equal(case.buffer, expected_buffer)
    gluon = dtype == "bfloat16" and torch.cuda.get_device_capability()[0] == 9
    assert backend.launches == {f"gdn_prefill[{'gluon' if gluon else 'triton'}]": 1}


@pytest.mark.parametrize(("order", "kb", "blocks"), BLOCK_MAJOR + LAYER_MAJOR)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_paged_prefill_is_chosen_by_device_and_dtype(backend, generator, order, kb, blocks, dtype):
    lengths, queries = [300, 70, 0, 129], [10, 70, 4, 129]
    case = paged_case(generator, lengths, order, kb, blocks, dtype=dtype)
    q_THD = normal(generator, (sum(queries), HEADS, DIM), case.buffer.device, dtype)
    cu_seqlens = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    inputs = (case.layout, 7, q_THD, case.kv_table_BN, cu_seqlens, case.context_len_B, DIM**-0.5, 129, 300)
    expected = naive_prefill.paged_prefill(*cached(case.buffer, *inputs))
    out = run(backend, "paged_prefill", case.buffer, *inputs)
    assert out.dtype == q_THD.dtype
    for first, last in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        if (expected[first:last] == 0).all():
            assert (out[first:last] == 0).all()
        else:
            assert rel_error(out[first:last], expected[first:last]) <= TOLERANCE[dtype]
    name = "gluon" if dtype == "bfloat16" and hopper() else "triton"
    assert backend.launches == {f"paged_prefill[{name}]": 1}


def test_paged_prefill_of_what_the_hopper_kernel_cannot_do(backend, generator):
    """Queries that do not start on 16 bytes."""
    case = paged_case(generator, [90], "block_major", 8, 11)
    wide = normal(generator, (90 * HEADS * DIM + 1,), case.buffer.device, "bfloat16")
    q_THD = wide[1:].view(90, HEADS, DIM)
    cu_seqlens = torch.tensor([0, 90], dtype=torch.int32, device="cuda")
    inputs = (case.layout, 7, q_THD, case.kv_table_BN, cu_seqlens, case.context_len_B, DIM**-0.5, 90, 90)
    expected = naive_prefill.paged_prefill(*cached(case.buffer, *inputs))
    assert rel_error(run(backend, "paged_prefill", case.buffer, *inputs), expected) <= 1e-2
    assert backend.launches == {"paged_prefill[triton]": 1}
