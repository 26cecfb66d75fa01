"""The model on a GPU: the torch operations there, the experts, and decode under a CUDA graph."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from qwen3_next_runs import Loop, tiny_config

from hybridcache.kernels.moe import few_tokens, router_rows, routing, tiled
from hybridcache.kernels.moe import tiles as moe_tiles
from hybridcache.kernels.norms import triton as norms
from hybridcache.kernels.testing import rel_error
from hybridcache.kernels.torch_ops import layers
from models.qwen3_next import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def rng():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-3)])
def test_cuda_gives_the_cpu_result(rng, dtype, tolerance):
    config = tiny_config(initializer_range=0.1)
    cpu, gpu = (build_model(config, dtype, device, seed=1) for device in ("cpu", "cuda"))
    gpu.load_state_dict(cpu.state_dict())
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (1, 64, 65, 150)]
    tokens, logits = zip(
        *(Loop(model, placement_seed=i).generate(prompts, 8, rng, 100) for i, model in enumerate([cpu, gpu]))
    )
    for a, b in zip(*logits):
        torch.testing.assert_close(a, b.cpu(), rtol=tolerance, atol=tolerance)
    if dtype == "float64":
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("way", [few_tokens, tiled], ids=["few_tokens", "tiled"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 8, 2), (37, 16, 3), (700, 64, 10)])
def test_experts_equal_each_token_through_its_own(rng, tokens, experts, k, way):
    hidden, inner = 128, 64
    shapes = ((experts, 2 * inner, hidden), (experts, hidden, inner), (2 * inner, hidden), (hidden, inner))
    matrices = [torch.randn(shape, device="cuda").mul(0.1).bfloat16() for shape in shapes]
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    weight, chosen = layers.route(torch.randn(tokens, router_rows(experts), device="cuda"), experts, k, True)
    out = way.mixture(x, weight, chosen, *matrices)
    expected = layers.mixture(x.double(), weight.double(), chosen, *(matrix.double() for matrix in matrices))
    assert rel_error(out, expected) < 1e-2


@pytest.mark.parametrize("name", moe_tiles.TILES)
def test_every_tiling_of_experts(rng, name):
    """At real widths, with experts of one token and of hundreds; the same to the bit every time."""
    tokens, experts, k, hidden, inner = rng.randint(200, 500), 24, 10, 2048, 512
    shapes = ((experts, 2 * inner, hidden), (experts, hidden, inner), (2 * inner, hidden), (hidden, inner))
    matrices = [torch.randn(shape, device="cuda").mul(0.02).bfloat16() for shape in shapes]
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    logits = torch.randn(tokens, router_rows(experts), device="cuda") + torch.arange(
        router_rows(experts), device="cuda"
    )
    weight, chosen = layers.route(logits, experts, k, True)
    out = tiled.mixture(x, weight, chosen, *matrices, tiles=moe_tiles.TILES[name])
    expected = layers.mixture(x.double(), weight.double(), chosen, *(matrix.double() for matrix in matrices))
    assert rel_error(out, expected) < 1e-2
    for _ in range(3):
        assert torch.equal(out, tiled.mixture(x, weight, chosen, *matrices, tiles=moe_tiles.TILES[name]))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 8, 2), (37, 61, 3), (9000, 512, 10)])
def test_routing_is_that_of_torch(rng, tokens, experts, k, renormalise):
    logits = torch.randn(tokens, router_rows(experts), device="cuda")
    logits[::2] = logits[::2].mul(4).round().div(4)  # full of equal logits, which chance makes too
    weight, chosen = routing.route(logits, experts, k, renormalise)
    expected_weight, _ = layers.route(logits.double(), experts, k, renormalise)
    # PyTorch's top-k promises no order of equals; its stable sort does.
    expected = logits[:, :experts].sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(chosen, expected.int())
    assert rel_error(weight, expected_weight) < 1e-6


@pytest.mark.parametrize("tokens", [1, 33])
def test_fused_norms_are_those_of_torch(rng, tokens):
    x, delta = torch.randn(2, tokens, 2048, device="cuda").bfloat16()
    weight = torch.randn(2048, device="cuda")
    total, out = norms.add_norm(x, delta, weight, 1e-6)
    expected_total, expected = layers.add_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert rel_error(out, expected) < 1e-2
    heads, gate = torch.randn(2, tokens, 32, 128, device="cuda").bfloat16()
    out, exact = torch.empty_like(heads), torch.empty_like(heads, dtype=torch.float64)
    norms.gated_norm(heads, gate, weight[:128], 1e-6, out)
    layers.gated_norm(heads.double(), gate.double(), weight[:128].double(), 1e-6, exact)
    assert rel_error(out, exact) < 1e-2
    norms.sigmoid_mul(heads, gate, out)
    layers.sigmoid_mul(heads.double(), gate.double(), exact)
    assert rel_error(out, exact) < 1e-2


def test_decode_in_a_cuda_graph_with_padding_rows(rng):
    """The captured forward pass gives what the eager one gives, to the bit, and padding rows change nothing."""
    from hybridcache.kernels.backend import Backend

    config = tiny_config(
        hidden_size=64, head_dim=32, linear_key_head_dim=16, moe_intermediate_size=32, initializer_range=0.1
    )
    model = build_model(config, "bfloat16", "cuda", seed=3)
    loop = Loop(model, placement_seed=1, backend=Backend("triton"))
    lengths = [5, 70, 33]
    for seq_id, n in enumerate(lengths):
        loop.admit(seq_id, [rng.randrange(97) for _ in range(n + 3)])
    loop.step(dict(enumerate(lengths)))
    for seq_id, n in enumerate(lengths):
        loop.strategy.grow(seq_id, n + 1)
    real = loop.batch([0, 1, 2], [1, 1, 1], 3)
    padded = replace(
        real,
        token_ids_T=F.pad(real.token_ids_T, (0, 2)),
        position_T=F.pad(real.position_T, (0, 2), value=10**6),
        row_T=torch.arange(5, dtype=torch.int32, device="cuda"),
        kv_table_BN=F.pad(real.kv_table_BN, (0, 0, 0, 2), value=-1),
        state_read_BL=F.pad(real.state_read_BL, (0, 0, 0, 2), value=-1),
        state_write_BL=F.pad(real.state_write_BL, (0, 0, 0, 2), value=-1),
        context_len_B=F.pad(real.context_len_B, (0, 2), value=1),
        logit_index_R=torch.arange(5, device="cuda"),
        num_decode=5,
    )
    buffer = loop.pool.buffer
    before = buffer.clone()
    with torch.inference_mode():
        expected = model(padded, loop.caches).clone()
        after = buffer.clone()
        buffer.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(padded, loop.caches)
        assert torch.equal(buffer, before), "capture must not run"
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert torch.equal(buffer, after)
    assert out[:3].isfinite().all()
    assert not any("[torch]" in name for name in loop.backend.launches)
