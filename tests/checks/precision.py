"""How far logits in bfloat16 lie from float32's: this engine's, Transformers', and this engine's with parts in more precision.

    python -m tests.checks.precision [--device cuda] [--models 2] [--lengths 9 65 500] [--out precision.json]

Qwen3-Next cut to 4 layers, all other widths real, random bfloat16 weights. The reference is Transformers in float32 on the same
weights; its choice of experts is forced on everybody, since near-ties flip experts even between two runs of one model. Figures
are cosines of logits at every position: the lowest, the 1st percentile and the median. The engine's side prefills in chunks
of random lengths and decodes each prompt's last 8 tokens one at a time.

Variants replace one part at a time by a more precise form: the residual stream in float32, the gated delta net, attention or
experts in PyTorch with float32 inside. What a variant gains is what that part's rounding costs.
"""

import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import real_width  # noqa: E402

from benchmarks.record import arguments, keep  # noqa: E402
from hybridcache.kernels.backend import Backend, Caches  # noqa: E402
from hybridcache.memory.layout import Layout  # noqa: E402

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


class Mixed(Backend):
    """The device's backend with some cache operations in PyTorch, whose arithmetic is float32, and others replaced."""

    def __init__(self, name: str, exact: Sequence[str] = (), **replaced: Callable[..., Any]) -> None:
        super().__init__(name)
        self.exact = exact
        for operation, function in replaced.items():
            setattr(self, operation, function)

    def bind(self, buffer: torch.Tensor, layout: Layout) -> Caches:
        found, torchs = super().bind(buffer, layout), Backend("torch").bind(buffer, layout)
        for ours, theirs in (*zip(found.attention, torchs.attention), *zip(found.states, torchs.states)):
            for operation in set(self.exact) & set(vars(theirs)):
                setattr(ours, operation, getattr(theirs, operation))
        return found


STATE = ("gdn_prefill", "gdn_decode")
ATTENTION = ("qk_norm_rope_store", "paged_prefill", "paged_decode")


def variants(device: str) -> dict[str, Backend]:
    """Backends by what they compute more precisely."""
    name = "triton" if device == "cuda" else "torch"
    return {
        "engine": Mixed(name),
        "gated delta net in float32": Mixed(name, STATE),
        "attention in float32": Mixed(name, ATTENTION),
        "experts in float32": Mixed(name, mixture=wide_mixture),
        "stream in float32": Mixed(name, add_norm=wide_add_norm),
        "all of these": Mixed(name, (*STATE, *ATTENTION), mixture=wide_mixture, add_norm=wide_add_norm),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", type=int, default=2, help="how many random models")
    parser.add_argument("--experts", type=int, help="fewer than the real 512, for a small machine")
    parser.add_argument("--vocabulary", type=int, help="less than the real one")
    parser.add_argument("--embedding-std", type=float, help="instead of the configuration's initializer_range")
    parser.add_argument("--lengths", type=int, nargs="+", default=[9, 65, 500])
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 31))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    config = real_width.cut_config(args.experts, args.vocabulary)
    found: dict[str, list[torch.Tensor]] = {}
    for _ in range(args.models):
        torch.manual_seed(rng.randrange(1 << 30))
        theirs = real_width.transformers_model(config, args.device)
        if args.embedding_std is not None:
            theirs.model.embed_tokens.weight.data.normal_(0.0, args.embedding_std)
        real_width.in_precision(theirs, torch.float32)
        prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in args.lengths]
        expected, chosen = zip(*(real_width.reference_logits(theirs, prompt) for prompt in prompts))
        real_width.in_precision(theirs, torch.bfloat16)
        logits = {
            "Transformers": [real_width.reference_logits(theirs, prompt, c)[0] for prompt, c in zip(prompts, chosen)]
        }
        ours = real_width.our_model(theirs)
        for name, backend in variants(args.device).items():
            logits[name] = real_width.our_logits(ours, backend, prompts, chosen, rng)
        for name, each in logits.items():
            found.setdefault(f"{name}, to float32", []).append(real_width.cosines(each, expected))
        found.setdefault("engine, to Transformers", []).append(
            real_width.cosines(logits["engine"], logits["Transformers"])
        )
        del theirs, ours
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    cosines = {}
    for name, parts in found.items():
        cosine = pd.Series(torch.cat(parts).double().cpu().numpy())
        cosines[name] = {"lowest": cosine.min(), "percentile_1": cosine.quantile(0.01), "median": cosine.median()}
        cosines[name]["positions"] = len(cosine)
    print(pd.DataFrame(cosines).T.round(5).to_string())
    std = args.embedding_std or config.initializer_range
    keep(args.out, seed=args.seed, lengths=args.lengths, embedding_std=std, cosines=cosines)


if __name__ == "__main__":
    main()
