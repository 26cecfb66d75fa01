"""The model at the real widths of Qwen3-Next, bf16 with Triton kernels, against Transformers on the same random weights."""

import random

import pytest
import torch
import torch.nn.functional as F
from qwen3_next_runs import Loop
from transformers import Qwen3NextForCausalLM

from hybridcache.kernels.moe import naive
from models.configs import shipped_config
from models.qwen3_next import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS = 4
DECODED = 8
"""Last tokens of every prompt, given one at a time."""


@pytest.fixture(scope="module")
def pair():
    """Transformers' model and ours, four layers of real width, the same weights."""
    config = shipped_config("qwen3_next_8l")
    config.num_hidden_layers, config.layer_types = LAYERS, config.layer_types[:LAYERS]
    torch.manual_seed(random.randrange(1 << 30))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            reference = Qwen3NextForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    ours = build_model(config, "bfloat16", "cuda")
    weights = reference.state_dict()
    for name, slot in ours.slots(weights):
        slot.write(weights[name])
    return reference, ours


def reference_logits(reference, prompt: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``[tokens, vocabulary]``, and the experts that every layer chose, ``[tokens, k]``."""
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
        for layer in reference.model.layers
    ]
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits.float(), chosen


def forced(moe, chosen_Tk: torch.Tensor):
    """``moe.forward`` with the experts given, weighted by its own router."""

    def forward(x_TD, ops):
        logits_TR = F.linear(x_TD, moe.router).float()
        weight_TE = logits_TR[:, : moe.num_experts].softmax(-1)
        weight_Tk = weight_TE.gather(1, chosen_Tk)
        if moe.renormalise:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        shared_T1 = logits_TR[:, moe.num_experts : moe.num_experts + 1].sigmoid()
        weight_Ts = torch.cat([weight_Tk, shared_T1], dim=1)
        experts, shared = moe.experts, moe.shared
        return ops.mixture(x_TD, weight_Ts, chosen_Tk.int(), experts.gate_up, experts.down, shared.gate_up, shared.down)

    return forward


def our_logits(ours, prompts, chosen) -> list[torch.Tensor]:
    """Logits of every token: prompts together in chunks of random lengths, their last tokens one at a time. ``chosen`` holds
    each prompt's experts by layer, or is None for free routing."""
    from hybridcache.kernels.triton_backend import TritonBackend

    loop = Loop(ours, budget_bytes=128 << 20, backend=TritonBackend(), state_dtype="float32", placement_seed=7)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for seq_id, prompt in enumerate(prompts):
        loop.admit(seq_id, prompt)
    while any(loop.done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        counts = {}
        for i, prompt in enumerate(prompts):
            left = len(prompt) - DECODED - loop.done[i]
            if left > 0:
                counts[i] = min(left, random.randint(1, 400))
            elif loop.done[i] < len(prompt):
                counts[i] = 1
        decode = [i for i, n in counts.items() if n == 1 and loop.done[i] > 0]
        order = decode + [i for i in counts if i not in decode]
        for number, layer in enumerate(ours.layers):
            if chosen is not None:
                parts = [chosen[i][number][loop.done[i] : loop.done[i] + counts[i]] for i in order]
                layer.mlp.forward = forced(layer.mlp, torch.cat(parts))
        for i, logits in loop.step(counts).items():
            found[i].append(logits.float())
    for layer in ours.layers:
        layer.mlp.__dict__.pop("forward", None)
    assert not any("[torch]" in name for name in loop.backend.launches), loop.backend.launches
    return [torch.cat(parts) for parts in found]


@pytest.mark.xfail(
    reason="aims at a cosine of 0.999 at every position; the lowest measured on an H100 is 0.9986, cause not found yet",
    raises=AssertionError,
)
def test_logits_are_those_of_transformers(pair, record_property):
    reference, ours = pair
    prompts = [[random.randrange(150_000) for _ in range(n)] for n in (DECODED + 1, 65, random.randint(300, 700))]
    expected, chosen = zip(*(reference_logits(reference, prompt) for prompt in prompts))
    cosines = [F.cosine_similarity(a, b, dim=1) for a, b in zip(our_logits(ours, prompts, chosen), expected)]
    lowest = min(float(cosine.min()) for cosine in cosines)
    record_property("lowest_cosine", lowest)
    free = [F.cosine_similarity(a, b, dim=1) for a, b in zip(our_logits(ours, prompts, None), expected)]
    close = torch.cat(free) >= 0.999
    record_property("free_routing_positions_above_0.999", float(close.float().mean()))
    if lowest < 0.998:
        pytest.fail(f"lowest cosine {lowest}: worse than ever measured")  # not an AssertionError, so not expected
    assert lowest >= 0.999


def test_router_agrees_with_transformers_but_for_near_ties(pair, record_property):
    """On the same input, the sets of chosen experts differ only where the last chosen and the first left out are close."""
    reference, ours = pair
    x = torch.randn(2000, ours.config.hidden_size, device="cuda").bfloat16()
    for theirs, layer in zip(reference.model.layers, ours.layers):
        with torch.inference_mode():
            logits, _, expected = theirs.mlp.gate(x)
            _, found = naive.route(F.linear(x, layer.mlp.router), layer.mlp.num_experts, layer.mlp.top_k, True)
        k = layer.mlp.top_k
        top = logits.float().topk(k + 1, dim=1).values
        near_tie = top[:, k - 1] - top[:, k] <= 2.0**-7 * top[:, k - 1].abs()
        same = (found.long().sort(1).values == expected.sort(1).values).all(1)
        record_property("router_agreement", float(same.float().mean()))
        assert bool((same | near_tie).all())
