"""A soak of prefix reuse: random conversations with everything on, against each of their requests alone with everything off.

    python -m tests.checks.soak_prefix [--requests 2000] [--seed 1] [--out benchmarks/results/soak-prefix-cpu.json]

*On*: a random policy of checkpoints, retention and eviction; prompts with up to four outputs, which share what they can; a pool
so tight that checkpoints are evicted and requests preempted; aborts; released memory poisoned; overlap in every other run.
*Off*: one prompt at a time, a request for each of its outputs, and nothing kept. The model is a small Qwen3-Next in float64 on
a CPU, so that tokens must be equal. Every physical strategy has its share of the requests; after each run no byte may be left
behind.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import arguments, keep
from hybridcache.engine.engine import Engine
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.prefix.eviction import ORDERS
from hybridcache.prefix.policy import PLACEMENTS, RETENTIONS, PrefixPolicy
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from tests.checks.soak import SCALES, make_model
from tests.prefix.conversations import converse, draw, expected_outputs, num_requests

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_pool": ("shared_pool", {"placement_seed": 1}),
    "shared_pool_carve": ("shared_pool", {"mode": "carve", "placement_seed": 2}),
    "large_block": ("large_block", {}),
    "padded_page": ("padded_page", {"placement_seed": 3}),
    "static_split": ("static_split", {"ratio": 3.0}),
    "two_ended": ("two_ended", {}),
}
CONVERSATIONS = 16
"""In one run."""


def any_policy(rng: random.Random, **given: Any) -> PrefixPolicy:
    """A policy at random; every placement, retention and order comes up."""
    orders = [name for name in ORDERS if name != "farthest"]
    drawn: dict[str, Any] = {
        "placement": tuple(name for name in PLACEMENTS if rng.random() < 0.6) or ("generation_end",),
        "every": rng.choice([64, 128, 256]), "retention": rng.choice(RETENTIONS), "last_k": rng.choice([1, 2, 3]),
        "share": rng.choice([0.1, 0.5]), "eviction": rng.choice(orders), "wanted_share": rng.choice([0.0, 0.25, 1.0]),
        "history_tokens": rng.choice([0, 500, 1 << 20]), "host_bytes": 0,
        "host_state_share": rng.choice([None, 0.4]),
        "host_eviction": rng.choice([name for name in orders if name != "lru_path"]),
    }  # fmt: skip
    return PrefixPolicy(**{**drawn, **given})


def soak(
    requests: int, seed: int, conversations: int = CONVERSATIONS, labels: Sequence[str] = tuple(STRATEGIES)
) -> dict[str, Any]:
    """Run streams until each strategy has had its share of the requests. ``ok`` is the verdict."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    model = make_model(SCALES["cpu"], "cpu", seed)
    spec = CacheSpec.from_config(model.config, kv_dtype="float64", state_dtype="float64", conv_dtype="float64")
    backend, config = make_backend("torch", "cpu"), SchedulerConfig(max_tokens_per_step=96, max_running=8)
    counts = {
        "requests": 0,
        "equal": 0,
        "hit_tokens": 0,
        "refound_tokens": 0,
        "evicted": 0,
        "preempted": 0,
        "aborted": 0,
    }
    rows = {label: dict.fromkeys([*counts, "leaked_bytes", "failed_steps", "steps"], 0) for label in labels}
    started, overlap = time.perf_counter(), False
    while any(row["requests"] * len(rows) < requests for row in rows.values()):
        some = draw(rng.randrange(1 << 31), conversations)
        off = Engine(
            model, build("shared_pool", spec=spec, budget_bytes=1 << 25, physical=True), None, backend, overlap=False
        )
        expected = expected_outputs(off, [each.anew() for each in some])
        longest = max(len(c.prompt) + sum(len(new) + p.max_tokens for new, p, _ in c.turns) for c in some)
        for label, row in rows.items():
            overlap = not overlap
            strategy = tight(label, spec, longest, rng.choice([1.3, 2.0, 5.0]))
            on = Engine(model, strategy, config, backend, prefix=any_policy(rng), overlap=overlap, poison=True)
            run(on, some, expected, rng.randrange(1 << 31), row)
        overlap = not overlap  # each strategy has both
    total = {name: sum(row[name] for row in rows.values()) for name in counts}
    sound = not any(row["leaked_bytes"] or row["failed_steps"] for row in rows.values())
    met = all(total[name] for name in counts) and total["equal"] == total["requests"]
    return {"seed": seed, "seconds": time.perf_counter() - started, **total, "strategies": rows, "ok": sound and met}


def tight(label: str, spec: CacheSpec, longest: int, factor: float) -> Any:
    """A strategy with ``factor`` times about what the longest request needs."""
    name, options = STRATEGIES[label]
    budget = spec.request_bytes(longest)
    while True:
        strategy = build(name, spec=spec, budget_bytes=int(budget * factor), physical=True, **options)
        if strategy.request_limit() >= longest:
            return strategy
        budget += budget // 8


def run(engine: Engine, some: list[Any], expected: list[Any], seed: int, row: dict[str, Any]) -> None:
    """Run conversations in an engine and count in ``row`` what came of them."""
    aborted: list[int] = []

    def check() -> None:
        row["steps"] += 1
        if row["steps"] % 8 == 0:
            engine.strategy.check_integrity()
            engine.prefix.check()
        for seq in engine.sequences:
            refound[seq.seq_id] = seq.refound_tokens

    refound: dict[int, int] = {}
    found = converse(engine, [each.anew() for each in some], seed, check, aborts=0.01, aborted=aborted, arrivals=0.8)
    row["requests"] += num_requests(some)
    row["equal"] += sum(
        output == wanted
        for turns, turns_wanted in zip(found, expected, strict=True)
        for outputs, outputs_wanted in zip(turns, turns_wanted, strict=True)
        for output, wanted in zip(outputs, outputs_wanted, strict=True)
    )
    row["hit_tokens"] += engine.prefix.hit_tokens
    row["refound_tokens"] += sum(refound.values())
    row["evicted"] += engine.prefix.evicted
    row["preempted"] += engine.scheduler.num_preemptions
    row["aborted"] += len(aborted)
    row["failed_steps"] += engine.failed_steps
    while engine.prefix.make_room(urgent=True):
        pass
    usage = engine.strategy.usage()
    row["leaked_bytes"] += usage.budget - usage.reserved - usage.free


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and told, by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    record = soak(args.requests, seed)
    print(json.dumps(record, indent=1))
    keep(args.out, **record)
    if not record["ok"]:
        sys.exit(f"error: the soak of seed {seed} failed")


if __name__ == "__main__":
    main()
