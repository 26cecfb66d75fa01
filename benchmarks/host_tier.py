"""Copies of checkpoints to pinned host memory and back while 64 requests decode: their bandwidth, and what decoding loses.

    python -m benchmarks.host_tier --out FILE [--tiny]

Qwen3-Next cut to 8 layers, shared_pool in 6 GiB, checkpoints of 8,192 tokens. Bandwidth is that of the copy streams from the
first byte to the last of all checkpoints, beside that of one large pinned copy with nothing else running; steps while copies
are on their way are compared with steps without any. ``--tiny`` runs the same on a CPU, where no time means anything.
"""

import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.record import arguments, keep
from benchmarks.serving_pair import submit
from hybridcache.engine.engine import Engine
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config
from models.qwen3_next import build_model

ROWS, CONTEXT, BASELINE_STEPS, ROUNDS = 64, 1024, 60, 8


def engine(tiny: bool) -> Engine:
    config = shipped_config("tiny" if tiny else "qwen3_next_8l")
    dtype, device = ("float32", "cpu") if tiny else ("bfloat16", "cuda")
    spec = CacheSpec.from_config(config, kv_dtype=dtype, state_dtype="float32", conv_dtype=dtype)
    budget = spec.request_bytes(4096) * 40 if tiny else 6 << 30
    policy = PrefixPolicy(placement=("generation_end",), retention="all", eviction="lru", host_bytes=budget)
    rows = 8 if tiny else ROWS
    return Engine(
        build_model(config, dtype, device),
        build("shared_pool", spec=spec, budget_bytes=budget, physical=True, table_rows=rows, max_request_tokens=16_384),
        SchedulerConfig(max_running=rows, max_tokens_per_step=256 if tiny else 8192),
        make_backend("auto", device),
        prefix=policy,
        unproven_host_tier=True,
    )


def pinned_bandwidth(out: bool) -> float:
    """Bytes per second of the best of five copies of 1 GiB."""
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        (host if out else device).copy_(device if out else host, non_blocking=True)
        end.record()
        end.synchronize()
        best = max(best, (1 << 30) / start.elapsed_time(end) * 1e3)
    return best


def steps_s(engine: Engine, go_on: Any) -> list[float]:
    """Seconds of each step as long as ``go_on()``."""
    times = []
    while go_on():
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return times


def copied(engine: Engine, out: bool, begin: Any) -> dict[str, Any]:
    """Begin copies in one go, and step until all have arrived."""
    host = engine.prefix.host
    assert host is not None
    mover: Any = host.mover
    stream = mover.swap._out_stream if out else mover.swap._in_stream
    on_cuda = stream is not None
    before = host.bytes_out, host.bytes_in
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_cuda else []
    if on_cuda:
        stream.wait_stream(torch.cuda.current_stream())
        events[0].record(stream)
    started = time.perf_counter()
    begin()
    begun_s = time.perf_counter() - started
    if on_cuda:
        events[1].record(stream)
    times = steps_s(engine, lambda: on_cuda and not events[1].query())
    host.poll()
    num_bytes = (host.bytes_out - before[0]) if out else (host.bytes_in - before[1])
    seconds = events[0].elapsed_time(events[1]) / 1e3 if on_cuda else begun_s
    return {"bytes": num_bytes, "seconds": seconds, "host_s": begun_s, "steps_s": times}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    one = engine(args.tiny)
    prefix, host = one.prefix, one.prefix.host
    assert host is not None
    host.low_bytes = 0
    host.recompute_s = lambda start, end: 1e9
    llm = SimpleNamespace(engine=one, model=one.runner.model)
    submit(llm, 4 if args.tiny else 40, 96 if args.tiny else 8192, 1, seed=2)
    one.run()
    points = prefix.points
    submit(llm, 8 if args.tiny else ROWS, 32 if args.tiny else CONTEXT, 100 if args.tiny else 4000, seed=3)
    for _ in range(20 if args.tiny else 60):
        one.step()
    rows = []
    for number in range(2 if args.tiny else ROUNDS):
        left = iter(range(10 if args.tiny else BASELINE_STEPS))
        base = steps_s(one, lambda left=left: next(left, None) is not None)
        out = copied(one, True, lambda: [host.copied(point) for point in points])
        for point in points:
            prefix._evict(point)
        waits = {"recall": None, "recalled": None, "waits": False, "wanted": None, "on_device": False, "version": 0}
        back = copied(
            one, False, lambda waits=waits: [host.recall(SimpleNamespace(**waits), p, urgent=False) for p in points]
        )
        assert all(point.live for point in points)
        for point in points:
            host.forget(point)
        for direction, found in (("out", out), ("back", back)):
            times = found.pop("steps_s")
            rows.append({"round": number, "direction": direction, **found, "base_ms": median(base) * 1e3})
            rows[-1] |= {"steps": len(times), "mean_base_ms": sum(base) / len(base) * 1e3}
            rows[-1] |= {"gb_per_s": found["bytes"] / found["seconds"] / 1e9}
            if times:
                rows[-1] |= {"step_ms": median(times) * 1e3, "mean_step_ms": sum(times) / len(times) * 1e3}
    summary = []
    for direction in ("out", "back"):
        mine = [row for row in rows if row["direction"] == direction][1:]  # the first warms up
        line = {"direction": direction, "gb_per_s": median(row["gb_per_s"] for row in mine)}
        if not args.tiny:
            line["pinned_gb_per_s"] = pinned_bandwidth(direction == "out") / 1e9
            line["share"] = line["gb_per_s"] / line["pinned_gb_per_s"]
            line["slowdown"] = median(row["mean_step_ms"] / row["mean_base_ms"] for row in mine if row["steps"]) - 1
        summary.append(line)
        print(line)
    keep(args.out, decoding=len(one.scheduler.running), checkpoints=len(points), summary=summary, rows=rows)


if __name__ == "__main__":
    main()
