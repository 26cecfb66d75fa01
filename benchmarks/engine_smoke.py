"""The engine on a GPU, in short: five workloads, what the host costs, how long the device waits, and whether tokens agree.

    python benchmarks/engine_smoke.py [--share 0.34] [--workloads bs1 chat] [--mode carve] [--out smoke.json] [--no-tokens]

Qwen3-Next cut to 8 layers, all other widths real, random bf16 weights; shared_pool with fp32 states in 2 GiB; greedy; 8,192
tokens a step. ``--share`` runs that part of each workload's requests (1 for all).

* ``host_ms``: the host's work in a step, waiting for the device excluded, as a mean over all steps; ``decode_host_ms``: the
  median of steps that only decode (``mixed_host_ms``: of others), beside it their mean; ``wait_ms``: the waiting.
* ``idle``: of the time between two steps that only decode, the part in which the first had ended and the second's inputs were
  not yet on their way, by events on the stream.
* Operations that wait for the device, in steps of all kinds, are counted and named: there should be none.
* Tokens of a small greedy stream with graphs and overlap must be those with graphs alone, and those of the same steps launched
  kernel by kernel. They are compared with those of an engine without graphs, whose attention is split otherwise: rounding
  tips over choices of experts there, so parting is reported and not failed.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checks.soak import Recorded
from hybridcache.engine.engine import Engine
from hybridcache.engine.garbage import settle_heap
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.llm import load_for_inference
from hybridcache.observe.environment import environment
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build

WORKLOADS = {
    "bs1": (1, 128, 256),
    "chat": (256, 1024, 128),
    "short": (512, 64, 256),
    "long": (64, 4096, 128),
    "mixed": (256, 2048, 64),
}
"""Requests, prompt tokens, output tokens."""
BARS = {"bs1": 780, "chat": 7_900, "short": 12_300, "long": 4_200, "mixed": 4_800}
"""Output tokens/s aimed at with all requests."""


def device_allocations() -> int:
    """How often PyTorch's allocator has asked the device for memory (it takes a fraction of a millisecond to tell)."""
    return torch.cuda.memory_stats()["num_device_alloc"]


class Watch:
    """Observes an engine's launches: the host's time, and events around each step on the stream."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[dict[str, Any]] = []
        send = engine.runner.inputs.send

        def watched_send() -> None:
            self.steps[-1]["start"].record()
            send()

        def watched(launch, rows_of):
            def launched(*args):
                decode, rows, tokens = rows_of(*args)
                step = {
                    "decode": decode,
                    "tokens": tokens,
                    "rows": rows,
                    "start": torch.cuda.Event(enable_timing=True),
                    "end": torch.cuda.Event(enable_timing=True),
                }
                self.steps.append(step)
                allocations = device_allocations() if decode != rows else 0
                before = time.perf_counter()
                flight = launch(*args)
                step["launch_ms"] = (time.perf_counter() - before) * 1e3
                step["allocations"] = device_allocations() - allocations if decode != rows else 0
                step["end"].record()
                return flight

            return launched

        def of_rows(rows):
            decode = sum(row.num_tokens == 1 and row.start > 0 for row in rows)
            return decode, len(rows), sum(row.num_tokens for row in rows)

        def of_last():
            return (self.steps[-1]["rows"],) * 3

        runner = engine.runner
        runner.launch, runner.repeat = watched(runner.launch, of_rows), watched(runner.repeat, of_last)
        runner.inputs.send = watched_send
        step_once = engine.step

        def watched_step():
            times, known = engine.times, len(self.steps)
            total, wait = times.total_s, times.wait_s
            output = step_once()
            for step in self.steps[known:]:
                step["host_ms"] = (times.total_s - total - times.wait_s + wait) * 1e3
            return output

        engine.step = watched_step

    def summary(self) -> dict[str, Any]:
        torch.cuda.synchronize()
        steps = self.steps
        for step in steps:
            step["device_ms"] = step["start"].elapsed_time(step["end"])
        pairs = [(a, b) for a, b in itertools.pairwise(steps) if a["decode"] == a["rows"] and b["decode"] == b["rows"]]
        gap = sum(max(a["end"].elapsed_time(b["start"]), 0.0) for a, b in pairs)
        span = sum(a["end"].elapsed_time(b["end"]) for a, b in pairs)
        found: dict[str, Any] = {"idle": gap / span if span else None}
        for name, chosen in (
            ("decode", [s for s in steps if s["decode"] == s["rows"]]),
            ("mixed", [s for s in steps if s["decode"] != s["rows"]]),
        ):
            if chosen:
                found |= {
                    f"{name}_steps": len(chosen),
                    f"{name}_rows": statistics.mean(s["rows"] for s in chosen),
                    f"{name}_device_ms": statistics.median(s["device_ms"] for s in chosen),
                    f"{name}_launch_ms": statistics.median(s["launch_ms"] for s in chosen),
                    f"{name}_host_ms": statistics.median(s["host_ms"] for s in chosen),
                    f"{name}_host_mean_ms": statistics.mean(s["host_ms"] for s in chosen),
                    f"{name}_host_p90_ms": sorted(s["host_ms"] for s in chosen)[len(chosen) * 9 // 10],
                    f"{name}_launch_max_ms": max(s["launch_ms"] for s in chosen),
                    f"{name}_allocations": sum(s["allocations"] for s in chosen),
                }
        self.steps.clear()
        return found


def make_engine(
    model, cache_bytes: int, state_dtype: str = "float32", mode: str = "exclusive", max_running: int = 256, **options
) -> Engine:
    spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype=state_dtype)
    strategy = build("shared_pool", spec=spec, budget_bytes=cache_bytes, physical=True, mode=mode)
    config = SchedulerConfig(max_running=max_running, max_tokens_per_step=8192)
    return Engine(model, strategy, config, make_backend("auto", "cuda"), **options)


def serve(engine: Engine, requests: int, prompt: int, output: int, seed: int) -> tuple[float, list]:
    """All requests at once. Seconds by the wall clock, and the finished sequences."""
    ids = np.random.default_rng(seed).integers(1000, 150_000, (requests, prompt))
    torch.cuda.synchronize()
    started = time.perf_counter()
    seqs = [engine.add_request(row, SamplingParams(max_tokens=output, ignore_eos=True)) for row in ids]
    engine.run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for seq in seqs:
        assert seq.finish_reason == "length", (seq.seq_id, seq.finish_reason, engine.error(seq.seq_id))
        engine.forget(seq.seq_id)
    return seconds, seqs


def run_workload(engine: Engine, watch: Watch, name: str, share: float) -> dict[str, Any]:
    requests, prompt, output = WORKLOADS[name]
    requests = max(1, round(requests * share))
    times, preempted = engine.times, engine.scheduler.num_preemptions
    steps, total, wait = times.steps, times.total_s, times.wait_s
    seconds, _ = serve(engine, requests, prompt, output, seed=1)
    steps, total, wait = times.steps - steps, times.total_s - total, times.wait_s - wait
    return {
        "workload": name,
        "requests": requests,
        "seconds": seconds,
        "output_tokens_per_s": requests * output / seconds,
        "bar": BARS[name],
        "steps": steps,
        "host_ms": (total - wait) / steps * 1e3,
        "wait_ms": wait / steps * 1e3,
        "preemptions": engine.scheduler.num_preemptions - preempted,
        **watch.summary(),
    }


def waits(engine: Engine) -> list[str]:
    """What PyTorch reports of operations that wait for the device, in steps that prefill, decode, and do both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for prompt in (700, 64, 1300):
            ids = np.arange(1000, 1000 + prompt)
            engine.add_request(ids, SamplingParams(max_tokens=6, ignore_eos=True))
            engine.add_request(ids, SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, ignore_eos=True))
            engine.step()
            engine.step()
        engine.run()
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(each.filename).name}:{each.lineno}: {each.message}" for each in caught]


def compare_tokens(model) -> dict[str, Any]:
    """A small greedy stream in four ways. Overlap changes no batch and no kernel, nor does the recording of graphs: tokens must
    be equal. Without graphs attention is split by the step's longest context, not by the longest that a row could have."""
    cache = 512 << 20
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1000, 150_000, length).tolist() for length in (1, 70, 128, 500, 529, 1100, 64, 333)]
    found = {}
    for name, graphs, overlap in (
        ("overlap", "true", "true"),
        ("graphs", "true", "false"),
        ("relaunched", "false", "false"),
        ("no graphs", "false", "false"),
    ):
        engine = make_engine(model, cache, max_running=16, cuda_graphs=graphs, overlap=overlap)
        if name == "relaunched":
            engine.runner.graphs = engine.runner._make_graphs(Recorded)
        seqs = [engine.add_request(prompt, SamplingParams(max_tokens=32, ignore_eos=True)) for prompt in prompts]
        engine.run()
        found[name] = [seq.output_ids for seq in seqs]
    equal = {name: sum(a == b for a, b in zip(found["overlap"], ids)) for name, ids in found.items()}
    must = ("graphs", "relaunched")
    return {"requests": len(prompts), "equal": equal, "ok": all(equal[name] == len(prompts) for name in must)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.34)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--mode", choices=("exclusive", "carve"), default="exclusive", help="of shared_pool")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true", help="of the host in a second run of each workload")
    parser.add_argument("--no-tokens", action="store_true")
    parser.add_argument("--experts", choices=("grouped", "tiled"), default="tiled", help="of many tokens")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    started = time.perf_counter()

    def clock(what: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {what}", flush=True)

    model, _ = load_for_inference("qwen3_next_8l", dtype="bfloat16", device="cuda", seed=0)
    model.experts = args.experts
    torch.cuda.synchronize()
    clock("weights")
    settle_heap()
    engine = make_engine(model, 2 << 30, args.state_dtype, args.mode)
    graphs = engine.runner.graphs
    clock(f"{len(graphs.shapes) if graphs else 'no'} graphs")
    # Untimed: prefill kernels are compiled here.
    for requests, prompt in ((1, 128), (8, 1024), (40, 64), (2, 4096), (4, 2048)):
        serve(engine, requests, prompt, 4, seed=0)
    clock("warm-up")
    found = waits(engine)
    clock(f"{len(found)} waits for the device {sorted(set(found))[:4]}")
    watch = Watch(engine)
    rows = []
    for name in args.workloads:
        rows.append(run_workload(engine, watch, name, args.share))
        clock(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}))
        if args.profile:
            profiler = cProfile.Profile()
            profiler.runcall(run_workload, engine, watch, name, args.share)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    stated = engine.memory
    memory = {"total": stated.total_bytes, "workspace": stated.workspace_bytes, **vars(stated)}
    memory |= {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    clock(f"memory {json.dumps(memory)}")
    record = {
        "memory": memory,
        "environment": environment(),
        "share": args.share,
        "state_dtype": args.state_dtype,
        "mode": args.mode,
        "experts": args.experts,
        "rows": rows,
        "launches": dict(engine.backend.launches),
        "waits": found,
    }
    del engine, watch
    if not args.no_tokens:
        record["tokens"] = compare_tokens(model)
        clock(f"tokens {json.dumps(record['tokens'])}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{'workload':9}{'requests':>9}{'tok/s':>9}{'bar':>8}{'host ms':>9}{'decode ms':>11}{'idle':>7}{'mixed ms':>10}"
    )
    for row in rows:
        host = row.get("decode_host_ms", 0)
        mixed = f"{row.get('mixed_device_ms', 0):.1f}/{row.get('mixed_launch_ms', 0):.1f}"
        print(
            f"{row['workload']:9}{row['requests']:9}{row['output_tokens_per_s']:9.0f}{row['bar']:8}{host:9.2f}"
            f"{row.get('decode_device_ms', 0):11.2f}{100 * (row['idle'] or 0):6.1f}%{mixed:>10}"
        )
    if not record.get("tokens", {"ok": True})["ok"]:
        sys.exit("error: tokens differ between steps of the same kernels")


if __name__ == "__main__":
    main()
