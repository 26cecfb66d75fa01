"""How far logits in bfloat16 lie from float32's: this engine's, Transformers', and this engine's with parts in more precision.

    python benchmarks/precision.py [--device cuda] [--models 2] [--lengths 9 65 500] [--out precision.json]

Qwen3-Next cut to 4 layers, all other widths real, random bfloat16 weights. The reference is Transformers in float32 on the same
weights; its choice of experts is forced on everybody, since near-ties flip experts even between two runs of one model. Figures
are cosines of logits at every position: the lowest, the 1st percentile and the median. The engine's side prefills in chunks
of random lengths and decodes each prompt's last 8 tokens one at a time.

Variants replace one part at a time by a more precise form: the residual stream in float32, the gated delta net, attention or
experts in PyTorch with float32 inside. What a variant gains is what that part's rounding costs.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Qwen3NextForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qwen3_next_runs import Loop  # noqa: E402

from hybridcache.environment import environment  # noqa: E402
from hybridcache.kernels.backend import make_backend  # noqa: E402
from hybridcache.kernels.torch_backend import TorchBackend  # noqa: E402
from models.configs import shipped_config  # noqa: E402
from models.qwen3_next import build_model, ops  # noqa: E402

LAYERS, DECODED = 4, 8


def transformers_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3NextForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def their_logits(model: Any, prompt: list[int], chosen: list | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``[tokens, vocabulary]`` and every layer's experts ``[tokens, k]``: those given, or the model's own choice."""
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


def forced(moe: Any, chosen_Tk: torch.Tensor) -> Callable:
    """``moe.forward`` with the experts given, weighted by its own router."""

    def forward(x_TD: torch.Tensor, operations: Any) -> torch.Tensor:
        logits_TR = F.linear(x_TD, moe.router).float()
        weight_Tk = logits_TR[:, : moe.num_experts].softmax(-1).gather(1, chosen_Tk)
        shared_T1 = logits_TR[:, moe.num_experts : moe.num_experts + 1].sigmoid()
        weight_Ts = torch.cat([weight_Tk / weight_Tk.sum(-1, keepdim=True), shared_T1], dim=1)
        experts, shared = moe.experts, moe.shared
        return operations.mixture(
            x_TD, weight_Ts, chosen_Tk.int(), experts.gate_up, experts.down, shared.gate_up, shared.down
        )

    return forward


def our_logits(
    model: Any, backend: Any, prompts: list[list[int]], chosen: list, rng: random.Random
) -> list[torch.Tensor]:
    """Logits of every token, ``[tokens, vocabulary]`` each."""
    loop = Loop(model, budget_bytes=128 << 20, backend=backend, state_dtype="float32", placement_seed=rng.randrange(99))
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        loop.admit(i, prompt)
    while any(loop.done[i] < len(prompt) for i, prompt in enumerate(prompts)):
        counts = {}
        for i, prompt in enumerate(prompts):
            left = len(prompt) - DECODED - loop.done[i]
            if left > 0:
                counts[i] = min(left, rng.randint(1, 400))
            elif loop.done[i] < len(prompt):
                counts[i] = 1
        decode = [i for i, n in counts.items() if n == 1 and loop.done[i] > 0]
        order = decode + [i for i in counts if i not in decode]
        for number, layer in enumerate(model.layers):
            parts = [chosen[i][number][loop.done[i] : loop.done[i] + counts[i]] for i in order]
            layer.mlp.forward = forced(layer.mlp, torch.cat(parts))
        for i, logits in loop.step(counts).items():
            found[i].append(logits.float())
    for layer in model.layers:
        layer.mlp.__dict__.pop("forward", None)
    return [torch.cat(parts) for parts in found]


# -- variants ------------------------------------------------------------------------------------------------------------


def wide_add_norm(x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float) -> tuple:
    x_TD = x_TD.float() if delta_TD is None else x_TD.float() + delta_TD.float()
    return x_TD, F.rms_norm(x_TD, weight_D.shape, 1.0 + weight_D, eps).bfloat16()


def wide_mixture(x_TD, weight_Ts, expert_Tk, gate_up_EID, down_EDI, shared_gate_up_JD, shared_down_DJ):
    """Experts with float32 products of the same bfloat16 matrices; the sum is rounded once."""
    k = expert_Tk.shape[1]

    def mlp(x, gate_up, down):
        gate, up = F.linear(x.float(), gate_up.float()).chunk(2, 1)
        return F.linear(F.silu(gate) * up, down.float())

    out_TD = weight_Ts[:, k:] * mlp(x_TD, shared_gate_up_JD, shared_down_DJ)
    for expert in expert_Tk.unique().tolist():
        token, column = (expert_Tk == expert).nonzero(as_tuple=True)
        y = mlp(x_TD[token], gate_up_EID[expert], down_EDI[expert])
        out_TD.index_add_(0, token, y * weight_Ts[token, column, None])
    return out_TD.to(x_TD.dtype)


def variants(device: str) -> dict[str, tuple[Any, dict[str, Callable]]]:
    """Backend, and operations between the projections that are replaced, by variant."""
    found: dict[str, tuple[Any, dict[str, Callable]]] = {"engine": (make_backend("auto", device), {})}
    for name, names in {
        "gated delta net in float32": ("gdn_prefill", "gdn_decode"),
        "attention in float32": ("qk_norm_rope_store", "paged_prefill", "paged_decode"),
    }.items():
        backend = make_backend("auto", device)
        for operation in names:
            setattr(backend, operation, getattr(TorchBackend(), operation))
        found[name] = (backend, {})
    found["experts in float32"] = (make_backend("auto", device), {"mixture": wide_mixture})
    found["stream in float32"] = (make_backend("auto", device), {"add_norm": wide_add_norm})
    backend = make_backend("auto", device)
    for operation in ("gdn_prefill", "gdn_decode", "qk_norm_rope_store", "paged_prefill", "paged_decode"):
        setattr(backend, operation, getattr(TorchBackend(), operation))
    found["all of these"] = (backend, {"mixture": wide_mixture, "add_norm": wide_add_norm})
    return found


def with_ops(replaced: dict[str, Callable], run: Callable[[], Any]) -> Any:
    """``run()`` while every new set of operations has some of them replaced."""
    original = ops.ops_for

    def patched(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        for name, operation in replaced.items():
            setattr(found, name, operation)
        return found

    import models.qwen3_next.step as step

    step.ops_for = patched
    try:
        return run()
    finally:
        step.ops_for = original


def figures(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([F.cosine_similarity(x, y, dim=1) for x, y in zip(a, b)]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", type=int, default=2, help="how many random models")
    parser.add_argument("--experts", type=int, help="fewer than the real 512, for a small machine")
    parser.add_argument("--vocabulary", type=int, help="less than the real one")
    parser.add_argument("--lengths", type=int, nargs="+", default=[9, 65, 500])
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 31))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    config = shipped_config("qwen3_next_8l")
    config.num_hidden_layers, config.layer_types = LAYERS, config.layer_types[:LAYERS]
    config.num_experts, config.vocab_size = args.experts or config.num_experts, args.vocabulary or config.vocab_size
    cosines: dict[str, list[torch.Tensor]] = {}
    for _ in range(args.models):
        torch.manual_seed(rng.randrange(1 << 30))
        theirs = transformers_model(config, torch.bfloat16, args.device)
        exact = transformers_model(config, torch.float32, args.device)
        exact.set_experts_implementation("eager")
        weights = theirs.state_dict()
        exact.load_state_dict({name: weight.float() for name, weight in weights.items()})
        prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in args.lengths]
        expected, chosen = zip(*(their_logits(exact, prompt) for prompt in prompts))
        found = {"Transformers": [their_logits(theirs, prompt, c)[0] for prompt, c in zip(prompts, chosen)]}
        del exact
        ours = build_model(config, "bfloat16", args.device)
        for name, slot in ours.slots(weights):
            slot.write(weights[name])
        for name, (backend, replaced) in variants(args.device).items():
            found[name] = with_ops(replaced, partial(our_logits, ours, backend, prompts, chosen, rng))
        for name, logits in found.items():
            cosines.setdefault(f"{name} to float32", []).append(figures(logits, list(expected)))
        cosines.setdefault("engine to Transformers", []).append(figures(found["engine"], found["Transformers"]))
        del theirs, ours, weights
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    record: dict[str, Any] = {"environment": environment(), "seed": args.seed, "lengths": args.lengths, "cosines": {}}
    for name, parts in cosines.items():
        cosine = torch.cat(parts)
        record["cosines"][name] = row = {
            "lowest": float(cosine.min()),
            "percentile_1": float(cosine.quantile(0.01)),
            "median": float(cosine.median()),
            "positions": cosine.numel(),
        }
        print(
            f"{name:44} lowest {row['lowest']:.5f}  1 % {row['percentile_1']:.5f}  median {row['median']:.5f}",
            flush=True,
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
