"""q/k norm, rotary positions and KV store on CUDA at the shape of Qwen3-Next, against the float64 reference."""

import random

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from hybridcache.kernels.qk_norm_rope_store import naive
    from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store
    from hybridcache.kernels.testing import attention_case, byte_index, cached, normal, rel_error
    from hybridcache.spec.dtypes import torch_dtype

HEADS, KV_HEADS, DIM, PAIRS, EPS = 16, 2, 256, 32, 1e-6
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float8_e4m3fn": 5e-2}
LARGE_POOL = 10 << 30


@pytest.fixture
def generator() -> "torch.Generator":
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    yield torch.Generator().manual_seed(seed)
    torch.cuda.empty_cache()


def inputs_of(generator, case, dtype):
    """Tokens of all rows and of a padding row with a stale position; q, k and v are slices of one projection."""
    tokens = [(row, position) for row, length in enumerate(case.lengths) for position in range(length)]
    tokens.insert(1, (case.lengths.index(0), 1 << 20))
    device, count = case.buffer.device, len(tokens)
    projected = normal(generator, (count, (2 * HEADS + 2 * KV_HEADS) * DIM), device, dtype)
    q, k, v = projected.split([2 * HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1)
    angle_TP = normal(generator, (count, PAIRS), device, "float32") * 3
    return (
        q.unflatten(1, (HEADS, 2 * DIM))[:, :, :DIM],
        k.unflatten(1, (KV_HEADS, DIM)),
        v.unflatten(1, (KV_HEADS, DIM)),
        normal(generator, (DIM,), device, "float32") * 0.3,
        normal(generator, (DIM,), device, "float32") * 0.3,
        EPS,
        angle_TP.cos(),
        angle_TP.sin(),
        case.kv_table_BN,
        torch.tensor([row for row, _ in tokens], dtype=torch.int32, device=device),
        torch.tensor([position for _, position in tokens], device=device),
    )


def check(generator, case, dtype):
    case.buffer.fill_(0xFF)
    inputs = inputs_of(generator, case, dtype)
    expected_buffer = case.buffer.clone()
    expected = naive.qk_norm_rope_store(*cached(expected_buffer, case.layout, 7, *inputs))
    out = qk_norm_rope_store(*cached(case.buffer, case.layout, 7, *inputs))
    assert out.dtype == inputs[0].dtype
    assert rel_error(out, expected) <= TOLERANCE[dtype]
    for row, length in enumerate(case.lengths):
        if length == 0:
            continue
        index = byte_index(case, 7, row, 0)
        kind = torch_dtype(case.layout.dtype)
        stored, wanted = (buffer[index].view(kind).double() for buffer in (case.buffer, expected_buffer))
        assert rel_error(stored, wanted) <= TOLERANCE[case.layout.dtype], f"row {row}"
        case.buffer[index] = expected_buffer[index]
    assert torch.equal(case.buffer, expected_buffer), "V, or bytes that are nobody's"


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float8_e4m3fn")]
)
@pytest.mark.parametrize(("order", "kb", "blocks"), [("block_major", 16, 11), ("layer_major", 1056, 1)])
def test_qk_norm_rope_store(generator, order, kb, blocks, dtype, kv_dtype):
    case = attention_case(
        generator,
        lengths=[1, 0, 300, 1057],
        order=order,
        layers=12,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=KV_HEADS,
        k_dim=DIM,
        v_dim=DIM,
        dtype=kv_dtype,
        device="cuda",
        fill=(),
    )
    check(generator, case, dtype)


def test_beyond_2_31_elements(generator):
    case = attention_case(generator, lengths=[100, 0, 200], layers=12, device="cuda", pool_bytes=LARGE_POOL, fill=())
    assert int(case.kv_table_BN[0, 0]) * (case.layout.manager_stride // 2) > 1 << 32
    check(generator, case, "bfloat16")


def test_it_replays_in_a_cuda_graph(generator):
    case = attention_case(generator, lengths=[40, 0, 90], layers=12, device="cuda", fill=())
    inputs = inputs_of(generator, case, "bfloat16")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        qk_norm_rope_store(*cached(case.buffer, case.layout, 7, *inputs))  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = qk_norm_rope_store(*cached(case.buffer, case.layout, 7, *inputs))
    for _ in range(3):
        for x in (*inputs[:3], inputs[6], inputs[7]):
            x.copy_(torch.randn_like(x))
        graph.replay()
        expected_buffer = torch.full_like(case.buffer, 0xFF)
        expected = naive.qk_norm_rope_store(*cached(expected_buffer, case.layout, 7, *inputs))
        assert rel_error(out, expected) <= 1e-2
        stored, wanted = (buffer.view(torch.bfloat16).nan_to_num() for buffer in (case.buffer, expected_buffer))
        assert rel_error(stored, wanted) <= 1e-2
