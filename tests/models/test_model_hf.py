"""The model against Transformers' Qwen3NextForCausalLM with the same weights, from poisoned and shuffled pool memory.

Weights, prompts, chunk cuts and placements are new every run. Rounding may decide where the reference itself is
undecided: prompts with a routing near-tie are drawn again, and a generated token may differ where Transformers' two best
logits, or two experts at the edge of the top k, are closer than rounding.
"""

import random

import pytest
import torch
import transformers
from qwen3_next_runs import Loop, tiny_config
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from hybridcache.strategies import STRATEGIES, strategy_class
from models.qwen3_next import build_model, load_model
from models.qwen3_next.model import has_experts

LOGIT_TIE, ROUTING_TIE = 1e-5, 1e-4
TOKENS = 20
LAUNCHED = {
    "linear_attention": ("gdn_prefill[torch]", "gdn_decode[torch]"),
    "full_attention": ("qk_norm_rope_store[torch]", "paged_prefill[torch]", "paged_decode[torch]"),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.5,
}

SHAPES = {
    "plain": {},
    "heads-6-3": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "hidden_size": 36,
    },
    "tied-biased": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "vocab_size": 51,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_conv_kernel_dim": 3,
    },
    "dense-between": {
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "vocab_size": 211,
    },
    "multi-query": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "linear_conv_kernel_dim": 2,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
    },
    "attention-first": {
        "num_hidden_layers": 5,
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
        "num_experts": 16,
        "num_experts_per_tok": 1,
    },
    "yarn": {
        "rope_parameters": YARN,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention"] * 2 + ["full_attention"],
    },
    "no-experts": {"num_experts": 0, "num_attention_heads": 2, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module", autouse=True)
def quiet_and_small():
    """No load reports from Transformers; one thread, for tensors this small."""
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def reference(config: Qwen3NextConfig) -> Qwen3NextForCausalLM:
    """Transformers' model with every parameter random: norms, biases and time steps too."""
    model = Qwen3NextForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "dt_bias", ".bias")):
            weight.data += torch.randn_like(weight) * 0.2
    return model


def routing_gaps(model: Qwen3NextForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Per position, the least difference between the last chosen and the first unchosen expert's logit in any layer."""
    config = model.config
    if not any(has_experts(config, i) for i in range(config.num_hidden_layers)):
        return torch.full((len(tokens),), float("inf"))
    with torch.no_grad():
        layers = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    k = config.num_experts_per_tok
    best = torch.stack([logits.topk(k + 1).values for logits in layers])
    return (best[..., k - 1] - best[..., k]).amin(0)


def draw_prompt(rng: random.Random, model: Qwen3NextForCausalLM, length: int) -> list[int]:
    """A random prompt on which rounding routes no token differently."""
    for _ in range(50):
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(length)]
        if routing_gaps(model, prompt).min() > ROUTING_TIE:
            return prompt
    raise AssertionError(f"no prompt of {length} tokens without a routing tie in 50 draws")


def assert_same_tokens(model: Qwen3NextForCausalLM, prompt: list[int], ours: list[int]) -> None:
    """``ours`` is what Transformers generates, up to its first undecided token."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=len(ours),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    theirs = out.sequences[0, len(prompt) :].tolist()
    assert len(theirs) == len(ours) == TOKENS
    if theirs == ours:
        return
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    best = out.logits[first][0].topk(2).values
    routed = routing_gaps(model, out.sequences[0].tolist())[: len(prompt) + first].min()
    tied = best[0] - best[1] < LOGIT_TIE or routed < ROUTING_TIE
    assert tied, f"token {first}: {ours[first]} is not {theirs[first]}; logit gap {best[0] - best[1]}, routing {routed}"


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_logits_and_greedy_tokens(shape, tmp_path, rng):
    """Prefill in odd chunks, several requests at their own pace, then 20 greedy tokens."""
    config = tiny_config(**{"initializer_range": 0.1, "eos_token_id": None, **SHAPES[shape]})
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, "float32", "cpu")
    prompts = [draw_prompt(rng, theirs, n) for n in (1, rng.randint(2, 40), rng.randint(65, 100))]
    loop = Loop(model, mode=rng.choice(["exclusive", "carve"]), placement_seed=rng.randrange(1000))
    tokens, logits = loop.generate(prompts, TOKENS, rng)
    for prompt, ours, ours_logits in zip(prompts, tokens, logits):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0]
        assert ours_logits.dtype == torch.float32
        assert ours_logits.shape == expected.shape
        assert (ours_logits - expected).abs().max() < 1e-4
        assert_same_tokens(theirs, prompt, ours)
    launches = loop.backend.launches
    per_layer = {kind: config.layer_types.count(kind) for kind in config.layer_types}
    for kind, operations in LAUNCHED.items():
        for operation in operations:
            count = launches.pop(operation)
            assert count > 0, operation
            assert count % per_layer[kind] == 0, operation
    assert not launches


PHYSICAL = [name for name in STRATEGIES if strategy_class(name).supports_physical]
VARIANTS = [("shared_pool", {"mode": "exclusive"}), ("shared_pool", {"mode": "carve"})]
VARIANTS += [(name, {}) for name in PHYSICAL if name != "shared_pool"]


@pytest.fixture(scope="module")
def exact_model(tmp_path_factory):
    """Transformers' model, the same weights in our float64 model, and prompts; one draw for all strategies."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = tiny_config(initializer_range=0.1, eos_token_id=None, num_hidden_layers=8)
    theirs = reference(config)
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    prompts = [draw_prompt(rng, theirs, n) for n in (3, 64, rng.randint(66, 90))]
    model = load_model(folder, "float64", "cpu")
    tokens, logits = Loop(model, placement_seed=1).generate(prompts, TOKENS, rng)
    return theirs, model, prompts, tokens, logits


@pytest.mark.parametrize(("strategy", "options"), VARIANTS, ids=["-".join([n, *o.values()]) for n, o in VARIANTS])
def test_every_strategy_gives_the_same_float64_tokens(exact_model, strategy, options, rng):
    """Other memory, other chunks and other batches: the same tokens, logits equal to rounding, and Transformers' too."""
    theirs, model, prompts, expected, expected_logits = exact_model
    tokens, logits = Loop(model, strategy, budget_bytes=8 << 20, **options).generate(prompts, TOKENS, rng)
    assert tokens == expected
    for a, b in zip(logits, expected_logits):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert_same_tokens(theirs, prompts[0], tokens[0])


def test_a_model_in_bfloat16_stays_near_the_float64_one(rng):
    """The same weights, activations and pool in bf16: logits within a few per cent. (Without experts: rounding may route
    a token elsewhere.)"""
    config = tiny_config(initializer_range=0.1, num_experts=0)
    rounded, exact = (build_model(config, dtype, "cpu", seed=rng.randrange(1000)) for dtype in ("bfloat16", "float64"))
    exact.load_state_dict(rounded.state_dict())
    prompts = [[rng.randrange(97) for _ in range(90)]]
    (a,), (b,) = (Loop(model, placement_seed=2).generate(prompts, 1, rng)[1] for model in (rounded, exact))
    assert a.dtype == torch.bfloat16
    error_T = (a.double() - b).norm(dim=1) / b.norm(dim=1)
    assert error_T.median() < 0.05, error_T
    assert error_T.quantile(0.9) < 0.2, error_T
