"""GDN prefill in Triton on CUDA at the shapes of Qwen3-Next against float64, with new random inputs every time."""

import random
from dataclasses import replace

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from kernel_checks import block_errors, checkpointed, reference64

    from hybridcache.kernels.devices import is_hopper
    from hybridcache.kernels.gdn_decode import naive as naive_decode
    from hybridcache.kernels.gdn_decode.triton import gdn_decode
    from hybridcache.kernels.gdn_prefill import naive
    from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
    from hybridcache.kernels.gdn_prefill.tiles import choose, default_tiles
    from hybridcache.kernels.gdn_prefill.triton import gdn_prefill
    from hybridcache.kernels.testing import cached, rel_error

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
LARGE_POOL = 10 << 30
"""Bytes: beyond 2^31 elements of every type up to float32, and beyond 2^32 bytes."""


@pytest.fixture
def generator():
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    yield torch.Generator().manual_seed(seed)
    torch.cuda.empty_cache()


def check(case, layer=1, dtype="bfloat16", state_dtype="float32", reference=None, tiles=None):
    """Outputs row by row, states and rings; nothing else in the pool changes."""
    expected_buffer = case.buffer.clone()
    expected = (reference or naive.gdn_prefill)(*cached(expected_buffer, *case.step(layer)))
    out = gdn_prefill(*cached(case.buffer, *case.step(layer)), tiles=tiles)
    assert out.dtype == case.x_TC.dtype
    offsets = case.cu_seqlens.tolist()
    for row, (first, last) in enumerate(zip(offsets, [*offsets[1:], out.shape[0]])):
        if (expected[first:last] == 0).all():
            assert (out[first:last] == 0).all(), f"tokens of padding row {row}"
        else:
            assert rel_error(out[first:last], expected[first:last]) <= TOLERANCE[dtype], f"row {row}"
    error, rings = block_errors(case, expected_buffer, layer)
    assert error <= max(TOLERANCE[dtype], TOLERANCE[state_dtype])
    assert rings
    assert torch.equal(case.buffer, expected_buffer)


BATCHES = [
    pytest.param([0, 1, 63, 64, 65], [0, 0, 0, 0, 0], id="from-0"),
    pytest.param([65, 1, 0, 3, 200], [63, 64, 9, 1, 100], id="resumed"),
    pytest.param([2, 40, 129], [62, -1, 5], id="with-padding-row"),
    pytest.param([300], [0], id="T300"),
    pytest.param([20] * 24, list(range(0, 240, 10)), id="B24-T20"),
]


@pytest.mark.parametrize(("lengths", "starts"), BATCHES)
@pytest.mark.parametrize(
    ("order", "dtype", "state_dtype"),
    [
        ("block_major", "bfloat16", "float32"),
        ("layer_major", "bfloat16", "bfloat16"),
        ("block_major", "float16", "float32"),
        ("block_major", "float32", "float32"),
    ],
)
def test_gdn_prefill(generator, lengths, starts, order, dtype, state_dtype):
    options = {"order": order, "dtype": dtype, "state_dtype": state_dtype, "conv_dtype": dtype, "device": "cuda"}
    case = prefill_case(generator, lengths=lengths, starts=starts, tail=9, **options)
    check(case, dtype=dtype, state_dtype=state_dtype)


@pytest.mark.parametrize(
    ("k_heads", "v_heads", "key_dim", "value_dim", "width"),
    [(4, 12, 64, 64, 4), (2, 2, 128, 256, 2), (1, 3, 96, 80, 3), (2, 4, 192, 128, 4), (2, 2, 256, 256, 4)],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gdn_prefill_of_other_shapes(generator, k_heads, v_heads, key_dim, value_dim, width, dtype):
    case = prefill_case(
        generator,
        lengths=[150, 0, 70, 1],
        starts=[0, 3, 100, 64],
        k_heads=k_heads,
        v_heads=v_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        width=width,
        dtype=dtype,
        conv_dtype=dtype,
        device="cuda",
    )
    check(case, dtype=dtype)


@pytest.mark.parametrize(
    ("lengths", "starts"), [([8192], [0]), ([1024] * 16, [4096] * 16), ([5000, 1, 300], [7, 0, 64])]
)
def test_gdn_prefill_of_long_rows(generator, lengths, starts):
    """Many pipelined chunks; the float64 reference is the torch backend's chunked form."""
    check(prefill_case(generator, lengths=lengths, starts=starts, device="cuda"), reference=reference64)


def test_gdn_prefill_of_many_rows(generator):
    """More rows than a program looks at at once."""
    lengths = torch.randint(0, 40, (300,), generator=generator).tolist()
    starts = torch.randint(-1, 500, (300,), generator=generator).tolist()
    options = {"layers": 1, "k_heads": 2, "v_heads": 4, "key_dim": 64, "value_dim": 64, "device": "cuda"}
    check(prefill_case(generator, lengths=lengths, starts=starts, **options), layer=0, reference=reference64)


def test_gdn_prefill_of_correlated_keys_without_decay(generator):
    """Keys that hardly differ and gates that keep everything: the triangular systems are at their worst."""
    options = {"dtype": "float32", "conv_dtype": "float32", "device": "cuda"}
    case = prefill_case(generator, lengths=[500], starts=[0], **options)
    case.x_TC = 0.05 * case.x_TC + case.x_TC[:1]
    case.state.a_log_V.fill_(-9.0)
    case.b_TV.add_(4.0)
    expected = naive.gdn_prefill(*cached(case.buffer.clone(), *case.step(1)))
    assert rel_error(gdn_prefill(*cached(case.buffer.clone(), *case.step(1))), expected) <= 1e-4


def test_gdn_prefill_beyond_2_31_elements(generator):
    case = prefill_case(generator, lengths=[70, 100], starts=[9, 0], device="cuda", pool_bytes=LARGE_POOL)
    assert int(case.state.state_write_BL[0, 0]) * (case.state.layout.stride // 4) > 1 << 31
    check(case, layer=0)


def test_gdn_prefill_is_deterministic(generator):
    """Rings are read and written by different launches: a race would change the bits between runs."""
    case = prefill_case(generator, lengths=[3, 700, 64, 2], starts=[62, 100, 0, 5], device="cuda")
    before = case.buffer.clone()
    first = gdn_prefill(*cached(case.buffer, *case.step(0)))
    after = case.buffer.clone()
    for _ in range(20):
        case.buffer.copy_(before)
        assert torch.equal(gdn_prefill(*cached(case.buffer, *case.step(0))), first)
        assert torch.equal(case.buffer, after)


@pytest.mark.parametrize(
    ("lengths", "starts"), [([66, 1300, 60, 20], [62, 0, 4, 0]), ([600] * 8, [64 * i for i in range(8)])]
)
@pytest.mark.parametrize("interval", [64, 512])
def test_checkpoints(generator, lengths, starts, interval):
    """States and rings, one right after the start and, at interval 64, some at the exact end; nothing else is written."""
    case = prefill_case(generator, lengths=lengths, starts=starts, device="cuda", pool_bytes=120 * 2_162_688)
    table_BNL = checkpoint_table(case, 1, interval, spare=1)
    expected_buffer = case.buffer.clone()
    kept = checkpointed(case, 1, interval, table_BNL, expected_buffer, reference64)
    assert kept
    reference64(*cached(expected_buffer, *case.step(1)))
    gdn_prefill(*cached(case.buffer, *case.step(1)), checkpoint_table_BNL=table_BNL, checkpoint_interval=interval)
    for entries in (None, [entry for _, _, entry in kept]):
        error, rings = block_errors(case, expected_buffer, 1, entries)
        assert error <= 1e-2
        assert rings
    assert torch.equal(case.buffer, expected_buffer)


def test_cutting_a_prompt_at_a_multiple_of_64_changes_no_bit(generator):
    """Chunks lie on absolute multiples of 64 whatever the cuts, and a float32 state loses nothing in between."""
    case = prefill_case(generator, lengths=[1000], starts=[0], device="cuda")
    at, layer, x, weight, a, b, a_log, dt_bias, *tables, cu, start = case.step(1)
    whole_buffer = case.buffer.clone()
    whole = gdn_prefill(*cached(whole_buffer, *case.step(1)))
    for first, last in ((0, 64), (64, 576), (576, 1000)):
        cu = torch.tensor([0, last - first], dtype=torch.int32, device="cuda")
        start = torch.tensor([first], dtype=torch.int32, device="cuda")
        part = slice(first, last)
        out = gdn_prefill(
            *cached(case.buffer, at, layer, x[part], weight, a[part], b[part], a_log, dt_bias, *tables, cu, start)
        )
        assert torch.equal(out, whole[part])
    assert torch.equal(case.buffer, whole_buffer)


def test_decode_goes_on_from_prefill(generator):
    case = prefill_case(generator, lengths=[130, 5], starts=[0, 60], device="cuda")
    expected_buffer = case.buffer.clone()
    naive.gdn_prefill(*cached(expected_buffer, *case.step(1)))
    gdn_prefill(*cached(case.buffer, *case.step(1)))
    state = case.state
    state.position_B = state.position_B + torch.tensor(case.lengths, device="cuda")
    expected = naive_decode.gdn_decode(*cached(expected_buffer, *state.step(1)))
    assert rel_error(gdn_decode(*cached(state.buffer, *state.step(1))), expected) <= 1e-2


def test_gdn_prefill_replays_in_a_cuda_graph(generator):
    """Capture once; replays see new inputs, lengths, starts and table entries, and the number of tokens in use shrinks."""
    case = prefill_case(generator, lengths=[200, 60, 40], starts=[0, 100, 64], device="cuda")
    table_BNL = torch.full((3, 2, 2), -1, dtype=torch.int32, device="cuda")

    def step(buffer):
        return gdn_prefill(*cached(buffer, *case.step(1)), checkpoint_table_BNL=table_BNL, checkpoint_interval=128)

    scratch = case.buffer.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(scratch)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case.buffer)
    for lengths in ([200, 60, 40], [10, 0, 290], [1, 150, 30]):
        for tensor in (case.x_TC, case.a_TV, case.b_TV):
            tensor.copy_(torch.randn_like(tensor))
        case.cu_seqlens.copy_(torch.tensor([0, *lengths]).cumsum(0))
        case.state.state_write_BL.copy_(case.state.state_write_BL.roll(1, 0))
        case.start_B.copy_(case.start_B.roll(1, 0))
        expected_buffer = case.buffer.clone()
        expected = reference64(*cached(expected_buffer, *case.step(1)))
        graph.replay()
        torch.cuda.synchronize()
        used = sum(lengths)
        assert rel_error(captured[:used], expected[:used]) <= 1e-2
        assert (captured[used:] == 0).all()
        for row in range(3):
            case.start_B[row] += lengths[row]


def test_rows_are_apart(generator):
    """NaN in one row's input or state shows in its output and in no other's."""
    case = prefill_case(generator, lengths=[10, 100, 10], starts=[5, 70, 5], device="cuda")
    case.x_TC[10:110] = float("nan")
    out = gdn_prefill(*cached(case.buffer, *case.step(1)))
    assert out[10:110].isnan().all()
    assert out[:10].isfinite().all()
    assert out[110:].isfinite().all()


def triton_tiles(case, rows=1):
    """The states in Triton, wide tiles for many rows; elsewhere the device chooses."""
    return default_tiles(case.state.layout, case.x_TC.dtype, rows, 132)


def test_hopper_devices_take_the_gluon_kernel(generator):
    case = prefill_case(generator, lengths=[1], starts=[0], device="cuda")
    assert choose(case.state.layout, case.x_TC, 1).hopper == is_hopper(case.x_TC.device)


@pytest.mark.parametrize(("lengths", "starts"), [*BATCHES, pytest.param([5000, 1, 300], [7, 0, 64], id="long")])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "dim"),
    [
        ("bfloat16", "float32", 128),
        ("bfloat16", "bfloat16", 128),
        ("float16", "float32", 128),
        ("bfloat16", "float32", 64),
    ],
)
@pytest.mark.parametrize("rows", [1, 16])
def test_states_in_triton(generator, lengths, starts, dtype, state_dtype, dim, rows):
    options = {"dtype": dtype, "state_dtype": state_dtype, "conv_dtype": dtype, "key_dim": dim, "value_dim": dim}
    case = prefill_case(generator, lengths=lengths, starts=starts, tail=9, device="cuda", **options)
    check(case, dtype=dtype, state_dtype=state_dtype, reference=reference64, tiles=triton_tiles(case, rows))


@pytest.mark.parametrize("interval", [64, 512])
@pytest.mark.parametrize("rows", [1, 16])
def test_checkpoints_in_triton(generator, interval, rows):
    lengths, starts = [66, 1300, 60, 20], [62, 0, 4, 0]
    case = prefill_case(generator, lengths=lengths, starts=starts, device="cuda", pool_bytes=120 * 2_162_688)
    table_BNL = checkpoint_table(case, 1, interval, spare=1)
    expected_buffer = case.buffer.clone()
    kept = checkpointed(case, 1, interval, table_BNL, expected_buffer, reference64)
    reference64(*cached(expected_buffer, *case.step(1)))
    options = {"checkpoint_table_BNL": table_BNL, "checkpoint_interval": interval, "tiles": triton_tiles(case, rows)}
    gdn_prefill(*cached(case.buffer, *case.step(1)), **options)
    for entries in (None, [entry for _, _, entry in kept]):
        error, rings = block_errors(case, expected_buffer, 1, entries)
        assert error <= 1e-2
        assert rings
    assert torch.equal(case.buffer, expected_buffer)


@pytest.mark.parametrize(("steps", "warps"), [(8, 4), (16, 4), (4, 16)])
def test_tiles_of_conv(generator, steps, warps):
    case = prefill_case(generator, lengths=[3, 700, 64, 2], starts=[62, 100, 0, 5], device="cuda", tail=70)
    tiles = replace(choose(case.state.layout, case.x_TC, 4), conv_steps=steps, conv_warps=warps)
    check(case, reference=reference64, tiles=tiles)


def test_gdn_prefill_of_weights_by_channel(generator):
    case = prefill_case(generator, lengths=[70, 100], starts=[9, 0], device="cuda")
    case.state.conv_weight_CW = case.state.conv_weight_CW.contiguous()
    check(case)


def test_states_in_triton_are_deterministic(generator):
    """Copies, products and stores overlap: a race would change the bits between runs."""
    case = prefill_case(generator, lengths=[3, 700, 64, 2], starts=[62, 100, 0, 5], device="cuda")
    before, tiles = case.buffer.clone(), triton_tiles(case)
    first = gdn_prefill(*cached(case.buffer, *case.step(0)), tiles=tiles)
    after = case.buffer.clone()
    for _ in range(20):
        case.buffer.copy_(before)
        assert torch.equal(gdn_prefill(*cached(case.buffer, *case.step(0)), tiles=tiles), first)
        assert torch.equal(case.buffer, after)
