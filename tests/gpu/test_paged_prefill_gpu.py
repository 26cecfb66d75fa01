"""Paged prefill in Triton on CUDA against float64 attention on gathered K and V, at the shapes of Qwen3-Next."""

import random

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from hybridcache.kernels.paged_decode.naive import gather
    from hybridcache.kernels.paged_prefill import hopper, triton
    from hybridcache.kernels.paged_prefill.tiles import Tiles
    from hybridcache.kernels.testing import attention_case, cached, normal, rel_error

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
LARGE_POOL = 10 << 30
"""Bytes: beyond 2^32 elements of bfloat16."""
LAYER = 7


@pytest.fixture
def generator() -> "torch.Generator":
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    yield torch.Generator().manual_seed(seed)
    torch.cuda.empty_cache()


@pytest.fixture(params=["triton", "hopper"])
def prefill(request):
    """The kernel for every GPU, and the one in Gluon for Hopper."""
    if request.param == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("compute capability is not 9.x")
    return {"triton": triton, "hopper": hopper}[request.param].paged_prefill


def paged_case(generator, lengths, order="block_major", kb=8, blocks=11, **options):
    """Twelve layers, as Qwen3-Next has; only layer 7 holds anything but poison."""
    options = {"kv_heads": 2, "k_dim": 256, "v_dim": 256, **options}
    return attention_case(
        generator,
        lengths=lengths,
        order=order,
        layers=12,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        device="cuda",
        fill=(LAYER,),
        **options,
    )


def expected_rows(case, q_THD, offsets, scale):
    """Float64 attention, row by row; zeros for padding rows."""
    heads, kv_heads = q_THD.shape[1], case.layout.num_kv_heads
    out_THD = q_THD.new_zeros(q_THD.shape[0], heads, case.layout.v_dim, dtype=torch.float64)
    for row, length in enumerate(case.lengths):
        begin, end = offsets[row], offsets[row + 1]
        if length == 0 or begin == end:
            continue
        entries = case.kv_table_BN[row].tolist()
        key_S = torch.arange(length, device="cuda")
        limit_Q = torch.arange(length - (end - begin), length, device="cuda")
        hidden_QS = key_S > limit_Q[:, None]
        for head in range(kv_heads):
            k_SD, v_SD = (
                gather(*cached(case.buffer, case.layout, LAYER), entries, length, kv, head) for kv in range(2)
            )
            group = slice(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            for q_QD, out_QD in zip(q_THD[begin:end, group].unbind(1), out_THD[begin:end, group].unbind(1)):
                score_QS = (q_QD.double() @ k_SD.T * scale).masked_fill_(hidden_QS, float("-inf"))
                out_QD.copy_(score_QS.softmax(-1) @ v_SD)
    return out_THD


def check(prefill, generator, case, queries, heads=16, dtype="bfloat16", **options):
    """The last ``queries[b]`` tokens of every row, from a tensor wider than its heads; every row within tolerance."""
    offsets = [0, *torch.tensor(queries).cumsum(0).tolist()]
    wide_THD = normal(generator, (offsets[-1], heads + 4, case.layout.k_dim), case.buffer.device, dtype)
    q_THD = wide_THD[:, 4:]
    scale = case.layout.k_dim**-0.5
    expected = expected_rows(case, q_THD, offsets, scale)
    torch.full(expected.shape, float("nan"), dtype=q_THD.dtype, device="cuda")  # the memory that the output gets next
    out = prefill(
        *cached(
            case.buffer,
            case.layout,
            LAYER,
            q_THD,
            case.kv_table_BN,
            torch.tensor(offsets, dtype=torch.int32, device="cuda"),
            case.context_len_B,
            scale,
            max(queries),
            max(case.lengths),
        ),
        **options,
    )
    assert out.dtype == q_THD.dtype
    for row, length in enumerate(case.lengths):
        begin, end = offsets[row], offsets[row + 1]
        if length == 0:
            assert (out[begin:end] == 0).all(), f"padding row {row}"
        elif begin < end:
            error = rel_error(out[begin:end], expected[begin:end])
            assert error <= TOLERANCE[dtype], f"row {row}: {end - begin} of {length} tokens: {error}"


@pytest.mark.parametrize(
    ("order", "kb", "blocks"),
    [*(("block_major", kb, 11) for kb in (8, 16, 32, 64)), ("layer_major", 1056, 1), ("layer_major", 64, 1)],
)
def test_whole_prompts_and_resumed_chunks(prefill, generator, order, kb, blocks):
    lengths = [1, 63, 64, 65, 130, 0, 2113, 1500, kb * blocks]
    queries = [1, 63, 64, 65, 130, 6, 2113, 333, 0]
    check(prefill, generator, paged_case(generator, lengths, order, kb, blocks), queries)


def test_short_chunks(prefill, generator):
    """Eight tokens at most: half a tile of queries."""
    check(prefill, generator, paged_case(generator, [900, 0, 7, 88, 3000]), [8, 3, 7, 1, 5])


def test_many_rows(prefill, generator):
    lengths = torch.randint(1, 200, (300,), generator=generator).tolist()
    queries = [int(torch.randint(0, length + 1, (1,), generator=generator)) for length in lengths]
    check(prefill, generator, paged_case(generator, lengths), queries)


@pytest.mark.parametrize(
    ("dim", "v_dim", "heads", "kv_heads", "dtype"),
    [
        pytest.param(128, 128, 32, 8, "bfloat16", id="D128-G4-bf16"),
        pytest.param(64, 64, 14, 2, "bfloat16", id="D64-G7-bf16"),
        pytest.param(256, 256, 16, 2, "float16", id="D256-G8-fp16"),
        pytest.param(256, 256, 16, 2, "float32", id="D256-G8-fp32"),
        pytest.param(96, 80, 6, 6, "bfloat16", id="D96x80-G1-bf16"),
        pytest.param(128, 128, 160, 1, "bfloat16", id="D128-G160-bf16"),
    ],
)
def test_other_models(generator, dim, v_dim, heads, kv_heads, dtype):
    prefill = triton.paged_prefill
    case = paged_case(
        generator, [700, 65, 0, 130], kb=16, kv_heads=kv_heads, k_dim=dim, v_dim=v_dim, dtype=dtype, extra_entries=0
    )
    check(prefill, generator, case, [700, 65, 2, 40], heads, dtype)
    check(prefill, generator, case, [3, 1, 1, 2], heads, dtype)


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "dtype"),
    [
        pytest.param(128, 32, 8, "bfloat16", id="D128-G4-bf16"),
        pytest.param(64, 14, 2, "bfloat16", id="D64-G7-bf16"),
        pytest.param(256, 16, 2, "float16", id="D256-G8-fp16"),
        pytest.param(128, 100, 1, "bfloat16", id="D128-G100-bf16"),
        pytest.param(256, 4, 4, "bfloat16", id="D256-G1-bf16"),
    ],
)
def test_other_models_on_hopper(generator, dim, heads, kv_heads, dtype):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("compute capability is not 9.x")
    case = paged_case(
        generator, [700, 65, 0, 130], kb=16, kv_heads=kv_heads, k_dim=dim, v_dim=dim, dtype=dtype, extra_entries=0
    )
    check(hopper.paged_prefill, generator, case, [700, 65, 2, 40], heads, dtype)
    check(hopper.paged_prefill, generator, case, [3, 1, 1, 2], heads, dtype)


def test_the_same_bits_every_time(prefill, generator):
    """A race between copies and products would change them."""
    case = paged_case(generator, [3000, 0, 700])
    q_THD = normal(generator, (3705, 16, 256), case.buffer.device, "bfloat16")
    offsets = torch.tensor([0, 3000, 3005, 3705], dtype=torch.int32, device="cuda")
    inputs = (case.layout, LAYER, q_THD, case.kv_table_BN, offsets, case.context_len_B, 1 / 16, 3000, 3000)
    first = prefill(*cached(case.buffer, *inputs))
    assert first.isfinite().all()
    for _ in range(20):
        assert torch.equal(prefill(*cached(case.buffer, *inputs)), first)


@pytest.mark.parametrize(
    "shape", [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 32, 4, 3), (64, 64, 8, 2)], ids=str
)
def test_tiles(generator, shape):
    check(triton.paged_prefill, generator, paged_case(generator, [1025, 300]), [1025, 77], tiles=Tiles(*shape))


def test_beyond_2_32_elements(prefill, generator):
    case = paged_case(generator, [700, 90], pool_bytes=LARGE_POOL)
    assert int(case.kv_table_BN[0, 0]) * (case.layout.manager_stride // 2) > 1 << 32
    check(prefill, generator, case, [700, 20])


def test_poison_in_a_live_block_shows(prefill, generator):
    case = paged_case(generator, [200, 200])
    address = case.layout.address(LAYER, int(case.kv_table_BN[1, 0]), 21, 1, 0)
    case.buffer[address : address + 512] = 0xFF
    q_THD = normal(generator, (400, 16, 256), case.buffer.device, "bfloat16")
    offsets = torch.tensor([0, 200, 400], dtype=torch.int32, device="cuda")
    out = prefill(
        *cached(case.buffer, case.layout, LAYER, q_THD, case.kv_table_BN, offsets, case.context_len_B, 1 / 16, 200, 200)
    )
    assert out[:200].isfinite().all()
    assert out[221:, :8].isnan().all()
    assert out[200:, 8:].isfinite().all()
