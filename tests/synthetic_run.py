"""A plausible run directory without a model: real strategies, scheduler and recorder under an invented clock.

Not a test. The memory bookkeeping, preemptions and pool maps are the real ones; durations come from a linear step time and
sampled tokens are numbers drawn from the request's id, so the "inference" phase here only looks like one.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Sequence
from hybridcache.observe.events import EventWriter
from hybridcache.observe.metrics import Recorder
from hybridcache.sim.capacity import waste_curve
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import Strategy, build
from hybridcache.workloads import Request

GIB = 1 << 30
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared_pool": ("shared_pool", {}),
    "shared_pool_carve": ("shared_pool", {"mode": "carve"}),
    "padded_page": ("padded_page", {}),
    "byte_exact": ("byte_exact", {}),
}
"""Label -> (class name, options), as configuration files give them."""

PHASES = ("capacity", "simulation", "inference")
WORKLOADS = {"chat": (400, 60), "short": (24, 40)}
"""Name -> mean prompt and output tokens."""


def hybrid_spec(layers: int = 8) -> CacheSpec:
    """Qwen3-Next's widths: every fourth layer is full attention, the others keep a gated-delta-net state."""
    attention = AttentionKV(num_kv_heads=2, k_dim=256, v_dim=256, dtype="bfloat16")
    state = RecurrentState(
        recurrent_shape=(32, 128, 128),
        recurrent_dtype="float32",
        conv_channels=8192,
        conv_kernel=4,
        conv_dtype="bfloat16",
    )
    is_attention = [i % 4 == 3 for i in range(layers)]
    return CacheSpec(
        model_type="qwen3_next",
        layers=tuple(
            LayerSpec(index=i, attention=attention if full else None, state=None if full else state)
            for i, full in enumerate(is_attention)
        ),
    )


def write_run(
    path: Path,
    *,
    phases: Iterable[str] = PHASES,
    strategies: dict[str, tuple[str, dict[str, Any]]] | None = None,
    workloads: Iterable[str] = tuple(WORKLOADS),
    spec: CacheSpec | None = None,
    budget_bytes: int = GIB // 2,
    requests: int = 60,
    repetitions: int = 1,
    lengths: Iterable[int] = (1, 12, 88, 545, 2000, 8192),
    seed: int = 0,
) -> Path:
    """Write results.parquet, events.jsonl, config.yaml and environment.json into ``path`` (made if missing)."""
    path.mkdir(parents=True, exist_ok=True)
    strategies = STRATEGIES if strategies is None else strategies
    spec = spec or hybrid_spec()
    rows: list[dict[str, Any]] = []
    lengths = list(lengths)
    with EventWriter(path / "events.jsonl") as events:
        for label, (name, options) in strategies.items():

            def make(name: str = name, options: dict[str, Any] = options) -> Strategy:
                return build(name, spec=spec, budget_bytes=budget_bytes, **options)

            for phase in phases:
                if phase == "capacity":
                    corners, waste = waste_curve(make(), min(max(lengths), 2000))
                    event = {"event": "waste_curve", "strategy": label, "length": corners, "waste_bytes": waste}
                    events.write(event)
                    rows += [_capacity(make(), label, length, events) for length in lengths]
                    continue
                for workload in workloads:
                    for repetition in range(repetitions):
                        labels = _labels(phase, label, workload, repetition)
                        rows.append(_serve(make, labels, requests, seed + repetition, events))
    pd.DataFrame(rows).to_parquet(path / "results.parquet")
    config = {"experiment": "synthetic", "strategies": list(strategies), "budget_bytes": budget_bytes, "seed": seed}
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "command": "python tests/synthetic_run.py",
        "commit": "0" * 40,
        "device": "none (invented clock)",
        "versions": {"python": "3.11", "pandas": pd.__version__},
        "started": "2026-01-01T00:00:00+00:00",
    }
    (path / "environment.json").write_text(json.dumps(environment))
    return path


def _labels(phase: str, strategy: str, workload: str, repetition: int = 0) -> dict[str, Any]:
    return {
        "experiment": "synthetic",
        "phase": phase,
        "strategy": strategy,
        "workload": workload,
        "repetition": repetition,
        "device": "cpu",
        "model": "qwen3_next",
        "backend": "none",
    }


def _capacity(strategy: Strategy, label: str, length: int, events: EventWriter) -> dict[str, Any]:
    """Admit requests of one length until one is refused."""
    count = 0
    while strategy.admit(count, length):
        count += 1
        if count == 1:
            one = strategy.usage()
    full = strategy.usage()
    common = {"strategy": label, "length": length}
    events.write({"event": "charge", **common, "held_bytes": one.held, "useful_bytes": one.useful})
    events.write(
        {
            "event": "capacity",
            **common,
            "residents": count,
            "useful_bytes": full.useful,
            "held_bytes": full.held,
            "budget_bytes": full.budget,
        }
    )
    row = {"budget_bytes": full.budget, "residents_peak": count, "utilization_mean": full.utilization}
    return {**_labels("capacity", label, f"length={length}"), **row}


def _serve(
    make: Callable[[], Strategy], labels: dict[str, Any], requests: int, seed: int, events: EventWriter
) -> dict[str, Any]:
    """Run one workload to its end. The phase changes the clock's speed only."""
    rng = random.Random(f"{labels['workload']}-{seed}")
    prompt, output = WORKLOADS[labels["workload"]]
    strategy = make()
    arrivals, refused = [], []
    for i in range(requests):
        tokens = [max(1, int(rng.expovariate(1 / mean))) for mean in (prompt, output)]
        seq = Sequence(seq_id=i, prompt_len=tokens[0], max_tokens=tokens[1], arrival_s=i * 0.02)
        if seq.max_stored_tokens > strategy.request_limit():
            refused.append(Request(i, seq.arrival_s, *tokens))
        else:
            arrivals.append(seq)
    scheduler = Scheduler(strategy, SchedulerConfig(max_tokens_per_step=1024))
    recorder = Recorder(labels, events)
    slow = 1.0 if labels["phase"] == "simulation" else 1.3
    now, pending, done = 0.0, list(arrivals), []
    while pending or scheduler.has_work:
        while pending and (pending[0].arrival_s <= now or not scheduler.has_work):
            now = max(now, pending[0].arrival_s)
            scheduler.submit(pending.pop(0))
        step = scheduler.schedule()
        duration = slow * (4e-3 + 2e-5 * step.num_tokens)
        recorder.step(now, duration, strategy, len(scheduler.running), len(scheduler.waiting))
        now += duration
        for item in step.items:
            if item.samples and labels["phase"] == "inference":
                item.seq.output_ids.append((item.seq.seq_id * 31 + item.end) % 1000)
        done += scheduler.complete(step, now)
    strategy.check_integrity()
    return recorder.finish(done, strategy, refused)
