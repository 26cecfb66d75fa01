"""The engine on a GPU, step by step: five workloads, what the host costs, what waits for the device, where a step's time goes.

    python -m benchmarks.engine --out FILE [--share 0.34] [--workloads bs1 chat] [--mode carve] [--state-dtype bfloat16]

Qwen3-Next cut to 8 layers, all other widths real, random bf16 weights; shared_pool in 2 GiB; greedy; at most 256 running and
8,192 tokens a step. ``--share`` runs that part of each workload's requests. Of every workload the record has the rate, and
the host's work in a step, waiting for the device left out: of steps in which all rows decode (``decode_host``) and of others.
Operations that wait for the device are counted and named: there should be none. Memory is what the engine stated beside what
PyTorch's allocator took. Profiles come last, because launches are slower behind PyTorch's profiler: time by class and by
kernel of steps that decode ``--rows`` rows, and of steps that prefill.
"""

import json
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import arguments, keep
from benchmarks.serving_pair import WORKLOADS, submit
from hybridcache import LLM
from hybridcache.observe.step_profile import kernel_spans, summarize

STEPS, CONTEXT, PREFILL = 5, 64, 8192


def serve(llm: LLM, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """All requests at once: the rate, and the host's work by kind of step in milliseconds."""
    engine, times, found = llm.engine, llm.engine.times, defaultdict(list)
    steps, preempted = times.steps, engine.scheduler.num_preemptions
    started = time.perf_counter()
    sequences = submit(llm, requests, prompt, output, seed=1)
    before = 0
    while engine.has_work:
        total, wait = times.total_s, times.wait_s
        tokens = len(engine.step().new_tokens)
        kind = "decode" if tokens == before > 0 else "other"
        found[kind].append((times.total_s - total - times.wait_s + wait) * 1e3)
        before = tokens
    seconds = time.perf_counter() - started
    for seq in sequences:
        assert seq.finish_reason == "length", (seq.seq_id, seq.finish_reason, engine.error(seq.seq_id))
        engine.forget(seq.seq_id)
    record: dict[str, Any] = {
        "requests": requests, "seconds": seconds, "output_tokens_per_s": requests * output / seconds,
        "steps": times.steps - steps, "preemptions": engine.scheduler.num_preemptions - preempted,
    }  # fmt: skip
    for kind, host in pd.DataFrame([(kind, ms) for kind, each in found.items() for ms in each]).groupby(0)[1]:
        record |= {f"{kind}_steps": len(host), f"{kind}_host_ms": host.median(), f"{kind}_host_mean_ms": host.mean()}
        record |= {f"{kind}_host_p90_ms": host.quantile(0.9), f"{kind}_host_max_ms": host.max()}
    return record


def waits(llm: LLM) -> list[str]:
    """What PyTorch reports of operations that wait for the device, in steps that prefill, decode, and do both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for prompt in (700, 64, 1300):
            submit(llm, 2, prompt, 6, seed=prompt)
            llm.engine.step()
            llm.engine.step()
        llm.engine.run()
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(each.filename).name}:{each.lineno}: {each.message}" for each in caught]


def profiled(llm: LLM, steps: int, top: int) -> dict[str, Any]:
    """Time by class and by kernel of the next steps, per step, in microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            llm.engine.step()
        torch.cuda.synchronize()
    spans = kernel_spans(profiler)
    by_kernel: dict[str, list[float]] = defaultdict(list)
    for start, end, name in spans:
        by_kernel[name].append((end - start) * 1e6)
    summary = summarize(spans, steps)
    kernels = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:top]
    return {
        "step_us": summary.seconds * 1e6,
        "launches": len(spans) / steps,
        "idle": summary.idle_fraction,
        "classes": {part.name: [part.seconds * 1e6, part.launches] for part in summary.parts},
        "kernels": [[name[:96], sum(each) / steps, len(each) / steps] for name, each in kernels],
    }


def profiles(llm: LLM, rows: list[int], top: int) -> dict[str, dict[str, Any]]:
    """Profiles of decode steps with so many rows, and of two steps that prefill."""
    found = {}
    for count in rows:
        sequences = submit(llm, count, CONTEXT, STEPS + 16, seed=count)
        while any(seq.num_output < 3 for seq in sequences):
            llm.engine.step()
        found[f"decode {count}"] = profiled(llm, STEPS, top)
        llm.engine.run()
    for count in (8, 1):
        for _ in range(2):  # the first compiles
            submit(llm, count, PREFILL // count, 1, seed=count)
            found[f"prefill {count} x {PREFILL // count}"] = profiled(llm, 1, top)
            llm.engine.run()
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--share", type=float, default=0.34)
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--mode", choices=("exclusive", "carve"), default="exclusive", help="of shared_pool")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 128], help="of profiled decode steps")
    parser.add_argument("--top", type=int, default=24, help="kernels of a profile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    llm = LLM(
        "qwen3_next_8l", "shared_pool", {"mode": args.mode}, cache_bytes=2 << 30, state_dtype=args.state_dtype,
        max_running=256, max_tokens_per_step=PREFILL,
    )  # fmt: skip
    for requests, prompt in ((1, 128), (8, 1024), (40, 64), (2, 4096), (4, 2048)):  # untimed: kernels are compiled here
        serve(llm, requests, prompt, 4)
    record: dict[str, Any] = {**vars(args), "waits": waits(llm), "rows": []}
    for name in args.workloads:
        requests, prompt, output = WORKLOADS[name]
        row = {"workload": name, **serve(llm, max(1, round(requests * args.share)), prompt, output)}
        record["rows"].append(row)
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}), flush=True)
    stated = llm.engine.memory
    record["memory"] = {"total": stated.total_bytes, "workspace": stated.workspace_bytes, **vars(stated)}
    record["memory"]["peak_allocated"] = torch.cuda.max_memory_allocated()
    record["memory"]["peak_reserved"] = torch.cuda.max_memory_reserved()
    print(f"{len(record['waits'])} waits {sorted(set(record['waits']))[:4]}\nmemory {json.dumps(record['memory'])}")
    record["launches"] = dict(llm.engine.backend.launches)
    record["profiles"] = profiles(llm, args.rows, args.top)
    for name, found in record["profiles"].items():
        print(f"\n== {name}: {found['step_us']:.0f} us, {found['launches']:.0f} kernels, idle {found['idle']:.1%}")
        parts = [[f"* {part}", *each] for part, each in sorted(found["classes"].items(), key=lambda item: -item[1][0])]
        print(
            pd.DataFrame([*parts, *found["kernels"]], columns=["kernel", "us", "launches"])
            .round(1)
            .to_string(index=False)
        )
    keep(args.out, **record)


if __name__ == "__main__":
    main()
