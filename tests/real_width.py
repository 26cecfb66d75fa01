"""Qwen3-Next cut to four layers of real width beside Transformers' on the same random weights: logits of every position, with
the experts that the reference chose forced on both, or free."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from qwen3_next_runs import Loop
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from models.configs import shipped_config
from models.qwen3_next import build_model

LAYERS = 4
DECODED = 8
"""Last tokens of every prompt, given one at a time."""
LONGEST_CHUNK = 400


def cut_config(experts: int | None = None, vocabulary: int | None = None) -> Qwen3NextConfig:
    """Four layers; experts and vocabulary of the real size, or fewer for a small machine."""
    config = shipped_config("qwen3_next_8l")
    config.num_hidden_layers, config.layer_types = LAYERS, config.layer_types[:LAYERS]
    config.num_experts, config.vocab_size = experts or config.num_experts, vocabulary or config.vocab_size
    return config


def transformers_model(config: Qwen3NextConfig, device: str) -> Any:
    """Transformers' model with random bfloat16 weights, as it initialises them. Its experts run one by one: in float32 too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3NextForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    model.set_experts_implementation("eager")
    return model


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """The same model with its weights in another precision, in place (buffers, such as rotary frequencies, keep theirs).
    bfloat16 weights are the same after float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def our_model(reference: Any) -> Any:
    """This project's model in bfloat16 with the reference's weights."""
    ours = build_model(reference.config, "bfloat16", str(reference.device))
    weights = reference.state_dict()
    for name, slot in ours.slots(weights):
        slot.write(weights[name])
    return ours


def reference_logits(
    model: Any, prompt: Sequence[int], chosen: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``[tokens, vocabulary]``, and the experts of every layer, ``[tokens, k]``: those given, or the model's choice."""
    experts: list[torch.Tensor] = []

    def hook(gate: Any, _: Any, out: tuple) -> tuple:
        logits, weights, own = out
        if chosen is None:
            experts.append(own)
            return out
        forced = chosen[len(experts)]
        experts.append(forced)
        weight = logits.float().softmax(-1).gather(1, forced)
        return logits, (weight / weight.sum(-1, keepdim=True)).to(weights.dtype), forced

    hooks = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt], device=model.device), use_cache=False).logits[0].float()
    for each in hooks:
        each.remove()
    return logits, experts


def _forced(moe: Any, chosen_Tk: torch.Tensor) -> Callable:
    """``moe.forward`` with the experts given, weighted by its own router."""

    def forward(x_TD: torch.Tensor, ops: Any) -> torch.Tensor:
        logits_TR = F.linear(x_TD, moe.router).float()
        weight_Tk = logits_TR[:, : moe.num_experts].softmax(-1).gather(1, chosen_Tk)
        if moe.renormalise:
            weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
        shared_T1 = logits_TR[:, moe.num_experts : moe.num_experts + 1].sigmoid()
        weight_Ts = torch.cat([weight_Tk, shared_T1], dim=1)
        experts, shared = moe.experts, moe.shared
        return ops.mixture(x_TD, weight_Ts, chosen_Tk.int(), experts.gate_up, experts.down, shared.gate_up, shared.down)

    return forward


def our_logits(
    model: Any,
    backend: Any,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[torch.Tensor]] | None,
    rng: random.Random,
) -> list[torch.Tensor]:
    """Logits of every token: prompts together in chunks of random lengths, their last tokens one at a time. ``chosen`` holds
    each prompt's experts by layer, or is None for free routing."""
    seed = rng.randrange(1 << 30)
    loop = Loop(model, budget_bytes=128 << 20, backend=backend, state_dtype="float32", placement_seed=seed)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        loop.admit(i, prompt)
    while any(loop.done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        counts = {}
        for i, prompt in enumerate(prompts):
            left = len(prompt) - DECODED - loop.done[i]
            if left > 0:
                counts[i] = min(left, rng.randint(1, LONGEST_CHUNK))
            elif loop.done[i] < len(prompt):
                counts[i] = 1
        decode = [i for i, n in counts.items() if n == 1 and loop.done[i] > 0]
        order = decode + [i for i in counts if i not in decode]
        for number, layer in enumerate(model.layers):
            if chosen is not None:
                parts = [chosen[i][number][loop.done[i] : loop.done[i] + counts[i]] for i in order]
                layer.mlp.forward = _forced(layer.mlp, torch.cat(parts))
        for i, logits in loop.step(counts).items():
            found[i].append(logits.float())
    for layer in model.layers:
        layer.mlp.__dict__.pop("forward", None)
    return [torch.cat(parts) for parts in found]


def cosines(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of the logits at every position of every prompt, on the host."""
    return torch.cat([F.cosine_similarity(x, y, dim=1) for x, y in zip(a, b, strict=True)]).cpu()
