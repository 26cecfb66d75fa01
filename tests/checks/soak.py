"""A soak: random requests of mixed lengths, late arrivals, aborts and preemptions, every feature on, against everything off.

    python -m tests.checks.soak [--requests 2000] [--device cpu] [--mode carve] [--seed 1] [--out soak.json]

*On*: overlap, decode in static rows (CUDA graphs; on a CPU they are replayed by running what they would have recorded), a pool
so tight that requests are preempted, prompts in chunks, aborts at random moments. *Off*: no overlap, no graphs, no aborts, room
for all. Every request must end, no block may be left behind, and no step may fail. On a CPU the model is small and in
float64, and tokens must be equal (of an aborted request, as far as it came). On CUDA it is Qwen3-Next cut to 8 layers in
bfloat16, whose roundings depend on the batch: there the agreement is reported.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import arguments, keep
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from hybridcache.strategies.base import Strategy
from models.configs import shipped_config
from models.qwen3_next import build_model
from models.qwen3_next.model import Qwen3Next

STRETCH = 40
"""Requests."""
LISTED = 5
"""Requests that parted, of which a record tells more."""


@dataclass(frozen=True)
class Scale:
    """What a device can do in about a minute or two."""

    model: str
    dtype: str
    state_dtype: str
    prompts: tuple[int, int, int]
    """Longest short, middling and long prompt."""
    max_tokens: int
    residents: int
    """About how many requests of the longest kind the tight pool holds."""
    running: int
    tokens_per_step: int


SCALES = {
    "cpu": Scale("tiny", "float64", "float64", (16, 120, 400), 32, 3, 24, 256),
    "cuda": Scale("qwen3_next_8l", "bfloat16", "float32", (64, 600, 3000), 64, 12, 128, 4096),
}


@dataclass(frozen=True)
class Plan:
    """One request of the stream."""

    prompt: np.ndarray
    params: SamplingParams
    arrives: int
    """Step before which it is added."""
    abort_after: int | None
    """Output tokens at which it is aborted (0: a step after its arrival); None for never."""


class Recorded:
    """What a graph does, launched anew: the function runs at every replay, and not at its capture."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


def make_stream(scale: Scale, requests: int, vocabulary: int, seed: int) -> list[Plan]:
    """Half the prompts are short, a tenth long; one in eight is aborted. Stretches of greedy requests alone, whose decode steps
    can be launched again, alternate with stretches in which every other request is sampled."""
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    plans, arrives = [], 0
    for i in range(requests):
        kind = rng.choices((0, 1, 2), (5, 4, 1))[0]
        least = 1 if kind == 0 else scale.prompts[kind - 1] + 1
        length, outputs = rng.randint(least, scale.prompts[kind]), rng.randint(1, scale.max_tokens)
        params = SamplingParams(
            max_tokens=outputs,
            temperature=rng.choice((0.0, 0.9)) if i // STRETCH % 2 else 0.0,
            top_p=rng.choice((1.0, 0.95)),
            seed=i,
            stop_token_ids=(rng.randrange(vocabulary),),
        )
        abort_after = rng.randint(0, outputs) if rng.random() < 0.125 else None
        plans.append(Plan(numbers.integers(0, vocabulary, length), params, arrives, abort_after))
        arrives += rng.choice((0, 0, 0, 1, 1, 4))
    return plans


def tight_strategy(scale: Scale, spec: CacheSpec, mode: str, seed: int) -> Strategy:
    """A pool for a few of the longest requests."""
    longest = scale.prompts[-1] + scale.max_tokens
    budget = scale.residents * spec.request_bytes(longest)
    while True:
        strategy = build("shared_pool", spec=spec, budget_bytes=budget, physical=True, mode=mode, placement_seed=seed)
        if strategy.request_limit() >= longest:
            return strategy
        budget += budget // 8


def run_stream(engine: Engine, plans: list[Plan], *, aborts: bool) -> tuple[list[Any], int]:
    """The stream's requests, ended, and how many steps it took."""
    seqs: list[Any] = []
    doomed: dict[int, int] = {}
    steps = 0
    while len(seqs) < len(plans) or engine.has_work:
        while len(seqs) < len(plans) and plans[len(seqs)].arrives <= steps:
            plan = plans[len(seqs)]
            seqs.append(engine.add_request(plan.prompt, plan.params))
            if aborts and plan.abort_after is not None:
                doomed[seqs[-1].seq_id] = plan.abort_after
        engine.step()
        steps += 1
        for seq_id in [each for each, after in doomed.items() if len(engine.sequence(each).output_ids) >= after]:
            engine.abort(seq_id)
            del doomed[seq_id]
    return seqs, steps


def make_model(scale: Scale, device: str, seed: int) -> Qwen3Next:
    config = shipped_config(scale.model)
    if scale.model == "tiny":
        # Strong enough that tokens depend on the whole context.
        config.initializer_range = 0.3
    return build_model(config, scale.dtype, device, seed=seed)


def soak(requests: int, device: str, mode: str, seed: int, scale: Scale | None = None) -> dict[str, Any]:
    """Run the stream twice and compare. ``ok`` is the verdict."""
    scale = scale or SCALES[device]
    if device == "cpu":
        torch.set_num_threads(1)  # operations are small: more threads would wait for each other
    model = make_model(scale, device, seed)
    spec = CacheSpec.from_config(
        model.config, kv_dtype=scale.dtype, state_dtype=scale.state_dtype, conv_dtype=scale.dtype
    )
    plans = make_stream(scale, requests, model.config.vocab_size, seed)
    limits: dict[str, Any] = {"max_running": scale.running, "max_tokens_per_step": scale.tokens_per_step}

    started = time.perf_counter()
    strategy = tight_strategy(scale, spec, mode, seed)
    # Admitted as soon as a first chunk fits: more are resident than the pool can hold to their ends.
    config = SchedulerConfig(**limits, admission="chunk")
    on = Engine(model, strategy, config, make_backend("auto", device), seed=seed, overlap=True, poison=True)
    if device == "cpu":
        on.runner.graphs = on.runner._make_graphs(Recorded)
    seqs, steps = run_stream(on, plans, aborts=True)
    strategy.check_integrity()
    assert on.runner.graphs is not None
    record: dict[str, Any] = {
        "requests": requests,
        "mode": mode,
        "seed": seed,
        "pool_bytes": strategy.budget_bytes,
        "steps": steps,
        "replayed": on.runner.graphs.replays,
        "preemptions": on.scheduler.num_preemptions,
        "aborted": sum(seq.finish_reason == "abort" for seq in seqs),
        "ended": sum(seq.finish_reason in ("stop", "length", "abort") for seq in seqs),
        "failed_steps": on.failed_steps,
        "leaked_bytes": strategy.usage().held,
        "residents_left": strategy.usage().residents,
        "launches": dict(on.backend.launches),
        "on_s": time.perf_counter() - started,
    }
    del on, strategy

    started = time.perf_counter()
    # Room for the longest request in every row.
    ample = scale.running * spec.request_bytes(scale.prompts[-1] + scale.max_tokens) * 5 // 4
    strategy = build("shared_pool", spec=spec, budget_bytes=ample, physical=True)
    options: dict[str, Any] = {"overlap": False, "cuda_graphs": False, "poison": True}
    off = Engine(model, strategy, SchedulerConfig(**limits), make_backend("auto", device), seed=seed, **options)
    expected, _ = run_stream(off, plans, aborts=False)
    record |= {"off_s": time.perf_counter() - started, "off_preemptions": off.scheduler.num_preemptions}
    record |= compare(seqs, expected)
    whole = record["ended"] == requests and not record["failed_steps"] and not record["leaked_bytes"]
    exact = device != "cpu" or record["equal"] == requests
    record["ok"] = whole and exact and bool(record["preemptions"]) and bool(record["aborted"])
    return record


def compare(found: list[Any], expected: list[Any]) -> dict[str, Any]:
    """Requests whose tokens are equal, an aborted one's as far as it came, and the share of tokens before tokens part."""
    equal, same, total, parted = 0, 0, 0, []
    for index, (a, b) in enumerate(zip(found, expected)):
        wanted = b.output_ids[: len(a.output_ids)] if a.finish_reason == "abort" else b.output_ids
        common = next((i for i, (x, y) in enumerate(zip(a.output_ids, wanted)) if x != y), None)
        if common is None:
            common = min(len(a.output_ids), len(wanted))
        same, total = same + common, total + max(len(a.output_ids), len(wanted))
        if a.output_ids == wanted and a.finish_reason in ("abort", b.finish_reason):
            equal += 1
        else:
            parted.append({"request": index, "at": common, "reasons": [a.finish_reason, b.finish_reason]})
    return {"equal": equal, "tokens": total, "tokens_agree": same / max(total, 1), "parted": parted[:LISTED]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--device", choices=list(SCALES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mode", choices=("exclusive", "carve"), default="exclusive")
    parser.add_argument("--seed", type=int, default=None, help="drawn, and told, by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: device='cuda': PyTorch finds no CUDA device here; choose cpu")
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    record = soak(args.requests, args.device, args.mode, seed)
    print(json.dumps(record, indent=1))
    keep(args.out, **record)
    if not record["ok"]:
        sys.exit(f"error: the soak of seed {seed} failed")


if __name__ == "__main__":
    main()
