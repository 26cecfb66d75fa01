"""Routing, experts and norms against their float64 references, in Triton's interpreter."""

import random

import pytest
import torch

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.moe import few_tokens, router_rows, tiled
from hybridcache.kernels.moe import tiles as moe_tiles
from hybridcache.kernels.moe.routing import route
from hybridcache.kernels.moe.silu_mul import silu_mul
from hybridcache.kernels.norms import triton as triton_norms
from hybridcache.kernels.testing import rel_error
from hybridcache.kernels.torch_ops import layers
from models.configs import shipped_config
from models.layers.moe import SparseMoe

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def weights(generator, experts, hidden, inner, shared, dtype):
    """Gate and up, and down, of the experts and of the shared one."""
    shapes = ((experts, 2 * inner, hidden), (experts, hidden, inner), (2 * shared, hidden), (hidden, shared))
    return [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in shapes]


def routed(generator, tokens, experts, k):
    logits = torch.randn(tokens, router_rows(experts), generator=generator)
    return layers.route(logits, experts, k, True)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 8, 2), (5, 61, 10), (3, 7, 7), (2, 1, 1)])
def test_routing(generator, tokens, experts, k, renormalise):
    logits = torch.randn(tokens + 1, router_rows(experts) + 3, generator=generator)[1:, :-3]
    weight, expert = route(logits, experts, k, renormalise)
    expected_weight, expected_expert = layers.route(logits.double(), experts, k, renormalise)
    assert expert.tolist() == expected_expert.tolist()
    assert expert.dtype == torch.int32
    assert weight.shape == (tokens, k + 1)
    assert rel_error(weight, expected_weight) < 1e-6
    if renormalise:
        torch.testing.assert_close(weight[:, :k].sum(1), torch.ones(tokens))


def test_of_equal_logits_the_first_expert_is_chosen(generator):
    logits = torch.randn(40, router_rows(61), generator=generator).mul(2).round()
    weight, expert = route(logits, 61, 10, True)
    expected_weight, _ = layers.route(logits.double(), 61, 10, True)
    expected = logits[:, :61].sort(dim=1, descending=True, stable=True).indices[:, :10]
    assert expert.tolist() == expected.tolist()
    assert rel_error(weight, expected_weight) < 1e-6


def test_routing_of_nan_names_experts(generator):
    logits = torch.randn(2, router_rows(5), generator=generator)
    logits[0] = float("nan")
    weight, expert = route(logits, 5, 3, True)
    assert ((expert >= 0) & (expert < 5)).all()
    assert weight[0].isnan().all()
    assert weight[1].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"), [(1, 6, 2, 64, 16), (3, 9, 4, 48, 24), (4, 2, 2, 130, 10)]
)
def test_few_tokens(generator, tokens, experts, k, hidden, inner, dtype):
    matrices = weights(generator, experts, hidden, inner, inner, dtype)
    x = torch.randn(tokens, 2 * hidden, generator=generator).to(dtype)[:, :hidden]
    weight, expert = routed(generator, tokens, experts, k)
    expected = layers.mixture(x.double(), weight.double(), expert, *(matrix.double() for matrix in matrices))
    for tiles in (few_tokens.Tiles(), few_tokens.Tiles(gate_rows=4, gate_dims=32, down_rows=16)):
        out = few_tokens.mixture(x, weight, expert, *matrices, tiles=tiles)
        assert out.dtype == dtype
        assert rel_error(out, expected) < TOLERANCE[dtype], tiles


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "inner"), [(1, 16), (7, 20), (9, 64)])
def test_silu_mul(generator, rows, inner, dtype):
    x = torch.randn(rows, 2 * inner, generator=generator).to(dtype)
    assert rel_error(silu_mul(x), layers.silu_mul(x.double())) < TOLERANCE[dtype]


TILES = {
    "swapped-16": moe_tiles.Tiles(16, True, moe_tiles.Product(32, 16, 3, 4), moe_tiles.Product(16, 32, 2, 4)),
    "one-size-64": moe_tiles.Tiles(64, False, moe_tiles.Product(16, 32, 2, 4), moe_tiles.Product(64, 16, 3, 4)),
    "two-sizes-128": moe_tiles.Tiles(128, False, moe_tiles.Product(32, 32, 4, 8), moe_tiles.Product(32, 32, 3, 8)),
    "two-sizes-swapped-128": moe_tiles.Tiles(
        128, True, moe_tiles.Product(64, 64, 4, 8), moe_tiles.Product(64, 64, 3, 8)
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner", "shared"),
    [(1, 5, 3, 40, 24, 24), (37, 7, 3, 72, 40, 16), (150, 3, 2, 64, 16, 8), (9, 130, 2, 48, 72, 72)],
)
def test_tiles(generator, tokens, experts, k, hidden, inner, shared, name, dtype):
    """Experts without tokens, with less than a tile's, and with several tiles; the last expert's rows go to the tensor's end.
    What no expert owns is poison."""
    matrices = weights(generator, experts, hidden, inner, shared, dtype)
    x = torch.randn(tokens, 2 * hidden, generator=generator).to(dtype)[:, :hidden]
    weight, expert = routed(generator, tokens, experts, k)
    if tokens == 150:  # one expert has all first choices: two whole tiles of 64 and one of 22
        expert[:, 0], expert[:, 1] = 2, expert[:, 1] % 2
    expected = layers.mixture(x.double(), weight.double(), expert, *(matrix.double() for matrix in matrices))
    out = tiled.mixture(x, weight, expert, *matrices, tiles=TILES[name])
    assert out.dtype == dtype
    # The interpreter cuts bits off where it casts to bfloat16, here three times.
    assert rel_error(out, expected) < 2 * TOLERANCE[dtype]


def test_tiles_are_chosen_by_assignments_per_expert():
    found = [moe_tiles.choose_tiles(tokens * 10, 512) for tokens in (1, 256, 1024, 8192)]
    assert found == [moe_tiles.FEW, moe_tiles.FEW, moe_tiles.SOME, moe_tiles.MANY]
    assert moe_tiles.choose_tiles(1, 1) == moe_tiles.FEW


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (3, 100), (2, 2048)])
def test_add_norm(generator, tokens, dim, dtype):
    x, delta = torch.randn(2, tokens, dim, generator=generator).to(dtype)
    weight = torch.randn(dim, generator=generator) * 0.3
    for added in (None, delta):
        total, out = triton_norms.add_norm(x, added, weight, 1e-6)
        expected_total, _ = layers.add_norm(x, added, weight, 1e-6)
        # The interpreter truncates to bf16.
        assert rel_error(total, expected_total) < (1e-7 if dtype == torch.float32 else 1e-2)
        _, expected = layers.add_norm(total.double(), None, weight.double(), 1e-6)
        assert out.dtype == dtype
        assert rel_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (3, 11, 24), (2, 32, 128)])
def test_gates(generator, tokens, heads, dim, dtype):
    """The gate is a slice of a wider projection, as in the model."""
    x = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    gate = torch.randn(tokens, 3 * heads * dim, generator=generator).to(dtype)[:, heads * dim : 2 * heads * dim]
    gate = gate.unflatten(1, (heads, dim))
    weight = torch.randn(dim, generator=generator)
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x, dtype=torch.float64)
    triton_norms.gated_norm(x, gate, weight, 1e-6, out)
    layers.gated_norm(x.double(), gate.double(), weight.double(), 1e-6, expected)
    assert rel_error(out, expected) < TOLERANCE[dtype]
    out.fill_(float("nan"))
    triton_norms.sigmoid_mul(x, gate, out)
    layers.sigmoid_mul(x.double(), gate.double(), expected)
    assert rel_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [3, few_tokens.MAX_TOKENS + 3])
def test_the_models_experts(generator, tokens):
    """Few and many tokens through the model's module, against the same weights in float64."""
    config = shipped_config("tiny")
    fused, exact = (SparseMoe(config, dtype, torch.device("cpu")) for dtype in (torch.bfloat16, torch.float64))
    fused.init_weights(0.2, generator)
    exact.load_state_dict(fused.state_dict())
    x = torch.randn(tokens, config.hidden_size, generator=generator).bfloat16()
    logits = torch.nn.functional.linear(x, fused.router)
    backend = Backend("triton")
    weight, expert = backend.route(logits, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
    matrices = (exact.experts.gate_up, exact.experts.down, exact.shared.gate_up, exact.shared.down)
    expected = layers.mixture(x.double(), weight.double(), expert, *matrices)
    assert rel_error(fused(x, backend), expected) < 2e-2
