"""Where the time of engine steps goes on a GPU: decode steps of several sizes and prefill steps kernel by kernel, and the
host's launching of steps that prefill.

    python benchmarks/decode_profile.py [--rows 1 16 128 256] [--top 24] [--out profile.json] [--no-graphs]

Qwen3-Next cut to 8 layers, all other widths real, random bf16 weights, shared_pool with fp32 states. Decode steps run as the
engine runs them, replayed graphs by default; contexts are short, so that what is seen is everything but the KV cache.

The launch of a step that prefills is timed on an idle device and behind a kernel that sleeps for 100 ms: a launch that
takes longer there waits for the device, and the profile of that launch names the function that does. ``allocations`` are
the caching allocator's calls of ``cudaMalloc`` during it. One kind of step has another number of tokens every time: what
libraries look up for a shape that they have not met shows there.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.llm import load_for_inference
from hybridcache.observe.environment import device_name
from hybridcache.observe.step_profile import summarize
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build

OURS = {
    "runner", "inputs", "rows", "model", "moe", "ops", "layers", "attention", "linear_attention", "triton_backend",
    "triton", "hopper", "grouped", "routing", "few_tokens", "tiled",
}  # fmt: skip
"""Modules whose functions are listed as operations."""
STEPS = 5
CONTEXT = 64
PREFILL = 8192
MIXED_ROWS = 84
SLEEP_MS = 100


def submit(engine: Engine, rows: int, prompt: int, output: int) -> None:
    for ids in np.random.default_rng(rows).integers(1000, 150_000, (rows, prompt)):
        engine.add_request(ids, SamplingParams(max_tokens=output, ignore_eos=True))


def profiled(engine: Engine, steps: int, top: int) -> dict[str, Any]:
    """Time by class and by kernel of the next steps, per step, in microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start * 1e-6, event.time_range.end * 1e-6, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    times: dict[str, list[float]] = defaultdict(list)
    for start, end, name in spans:
        times[name].append((end - start) * 1e6)
    summary = summarize(spans, steps)
    kernels = sorted(times.items(), key=lambda item: -sum(item[1]))
    return {
        "step_us": summary.seconds * 1e6,
        "launches": len(spans) / steps,
        "classes": {part.name: [part.seconds * 1e6, part.launches] for part in summary.parts},
        "kernels": [
            {"name": name[:96], "us": sum(each) / steps, "launches": len(each) / steps} for name, each in kernels[:top]
        ],
    }


def sleep_cycles() -> int:
    """Clock cycles for which ``torch.cuda._sleep`` takes ``SLEEP_MS``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    return int(10_000_000 * SLEEP_MS / start.elapsed_time(end))


def launch_ms(engine: Engine, submit_rows: Callable[[], None], cycles: int, profiler: cProfile.Profile | None) -> dict:
    """The host's time in the launch of the step that comes next, behind a sleep of that many cycles (0 for none)."""
    submit_rows()
    found: dict[str, Any] = {}
    launch = engine.runner.launch

    def timed(rows):
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["num_device_alloc"]
        if cycles:
            torch.cuda._sleep(cycles)
        if profiler is not None:
            profiler.enable()
        started = time.perf_counter()
        flight = launch(rows)
        found["ms"] = (time.perf_counter() - started) * 1e3
        if profiler is not None:
            profiler.disable()
        found["rows"], found["tokens"] = len(rows), sum(row.num_tokens for row in rows)
        found["allocations"] = torch.cuda.memory_stats()["num_device_alloc"] - before
        engine.runner.launch = launch
        return flight

    engine.runner.launch = timed
    engine.step()
    engine.run()
    return found


def host_launch(engine: Engine, submit_rows: Callable[[], None], top: int) -> dict[str, Any]:
    """Launch times of one kind of step, and where they go."""
    cycles = sleep_cycles()
    found: dict[str, Any] = {}
    for name, sleep in (("idle", 0), ("idle again", 0), ("busy", cycles), ("busy again", cycles)):
        found[name] = launch_ms(engine, submit_rows, sleep, None)
    profiler = cProfile.Profile()
    found["profiled"] = launch_ms(engine, submit_rows, cycles, profiler)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [
        {"function": f"{Path(file).name}:{line} {name}", "calls": calls, "own_ms": own * 1e3, "all_ms": whole * 1e3}
        for (file, line, name), (calls, _, own, whole, _) in stats.items()
    ]
    found["own"] = sorted(rows, key=lambda row: -row["own_ms"])[:top]
    ours = [row for row in rows if row["function"].split(".py:")[0] in OURS]
    found["operations"] = sorted(ours, key=lambda row: -row["all_ms"])[:top]
    return found


def show_launch(title: str, found: dict[str, Any]) -> None:
    print(f"\n== launch of {title}")
    for name in ("idle", "idle again", "busy", "busy again", "profiled"):
        one = found[name]
        print(
            f"   {one['ms']:9.2f} ms {name}: {one['rows']} rows, {one['tokens']} tokens, {one['allocations']} cudaMalloc"
        )
    for kind in ("own", "operations"):
        print(f"   {kind}")
        for row in found[kind]:
            print(f"   {row['own_ms']:9.3f} own {row['all_ms']:9.3f} all {row['calls']:6} x  {row['function'][:80]}")


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n== {title}: {found['step_us']:.0f} us, {found['launches']:.0f} kernels")
    for name, (us, launches) in sorted(found["classes"].items(), key=lambda item: -item[1][0]):
        print(f"   {us:9.1f} us {launches:6.1f} x  {name}")
    for kernel in found["kernels"]:
        print(f"      {kernel['us']:9.1f} us {kernel['launches']:6.1f} x  {kernel['name']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 128, 256])
    parser.add_argument("--top", type=int, default=24)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--experts", choices=("grouped", "tiled"), default="tiled", help="of many tokens")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    started = time.perf_counter()
    model, _ = load_for_inference("qwen3_next_8l", dtype="bfloat16", device="cuda", seed=0)
    model.experts = args.experts
    spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype="float32")
    most = max([*args.rows, 8])
    strategy = build("shared_pool", spec=spec, budget_bytes=2 * most * spec.request_bytes(PREFILL // 8), physical=True)
    config = SchedulerConfig(max_running=most, max_tokens_per_step=PREFILL)
    graphs = "false" if args.no_graphs else "auto"
    engine = Engine(model, strategy, config, make_backend("auto", "cuda"), cuda_graphs=graphs)
    print(f"[{time.perf_counter() - started:5.1f} s] engine", flush=True)
    record: dict[str, Any] = {
        "device": device_name(),
        "torch": torch.__version__,
        "graphs": graphs,
        "experts": args.experts,
        "steps": {},
    }
    for rows in args.rows:
        submit(engine, rows, CONTEXT, STEPS + 12)
        while engine.scheduler.waiting or any(seq.num_settled < 3 for seq in engine.scheduler.running):
            engine.step()
        record["steps"][f"decode {rows}"] = profiled(engine, STEPS, args.top)
        engine.run()
        for seq in engine.sequences:
            engine.forget(seq.seq_id)
    record["launches"] = {}
    for name, rows in (("prefill 8 x 1024", 8), ("prefill 1 x 8192", 1)):
        for _ in range(2):  # the first compiles
            submit(engine, rows, PREFILL // rows, 1)
            found = profiled(engine, 1, args.top)
            engine.run()
        record["steps"][name] = found
        record["launches"][name] = host_launch(engine, partial(submit, engine, rows, PREFILL // rows, 1), args.top)
        print(f"[{time.perf_counter() - started:5.1f} s] {name}", flush=True)

    lengths = itertools.count(PREFILL - 17, -17)

    def new_length() -> None:
        """A number of tokens that no step has had."""
        submit(engine, 1, next(lengths), 1)

    record["launches"]["prefill of a new length"] = host_launch(engine, new_length, args.top)

    def mixed() -> None:
        submit(engine, MIXED_ROWS, CONTEXT, 12)
        while engine.scheduler.waiting or any(seq.num_settled < 2 for seq in engine.scheduler.running):
            engine.step()
        submit(engine, 7, PREFILL // 8, 1)

    if most >= MIXED_ROWS + 7:
        mixed()
        engine.run()  # compiles
        record["launches"]["decode and prefill"] = host_launch(engine, mixed, args.top)
    print(f"[{time.perf_counter() - started:5.1f} s] profiled", flush=True)
    for name, found in record["steps"].items():
        show(name, found)
    for name, found in record["launches"].items():
        show_launch(name, found)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
