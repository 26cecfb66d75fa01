"""Host time of launching a step that prefills, operation by operation, on this machine's CPU and without a device.

    python benchmarks/host_launch.py [--mode carve] [--decoding 95] [--prefilling 4] [--steps 100] [--profile] [--out FILE]

Qwen3-Next cut to 8 layers on tensors without memory; Triton compiles for Hopper and launches nothing. Packing the step's inputs
is not in it, nor what CUDA takes of a launch. Tensors without memory make some of PyTorch's operations slower than CUDA's are:
compare two runs on one machine.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from hybridcache.bench.no_device import NoDevice, no_device
from hybridcache.kernels.backend import Backend
from hybridcache.kernels.batch import StepBatch
from hybridcache.observe.environment import environment
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config
from models.qwen3_next.model import Qwen3Next

META = torch.device("meta")
PROMPT = 2048


def make_batch(decoding: int, prefilling: int, state_layers: int, entries: int) -> StepBatch:
    """A step of one token each and prompts, the oldest tokens first."""
    tokens, rows = decoding + prefilling * PROMPT, decoding + prefilling
    table = torch.empty((rows, state_layers + entries), dtype=torch.int32, device=META)
    states = table[:, :state_layers]

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    return StepBatch(
        token_ids_T=empty(tokens, torch.int64),
        position_T=empty(tokens, torch.int64),
        row_T=empty(tokens),
        kv_table_BN=table[:, state_layers:],
        state_read_BL=states,
        state_write_BL=states,
        context_len_B=empty(rows),
        prefill_cu_seqlens=empty(prefilling + 1),
        prefill_start_P=empty(prefilling),
        logit_index_R=empty(rows, torch.int64),
        num_decode=decoding,
        max_prefill_len=PROMPT if prefilling else 0,
        max_context_len=PROMPT,
    )


def make_step(mode: str, decoding: int, prefilling: int) -> Callable[[], torch.Tensor]:
    config = shipped_config("qwen3_next_8l")
    model = Qwen3Next(config, torch.bfloat16, META).requires_grad_(False)
    spec = CacheSpec.from_config(config, kv_dtype="bfloat16", state_dtype="float32")
    layout = build("shared_pool", spec=spec, budget_bytes=2 << 30, physical=True, mode=mode).layout
    buffer = torch.empty(layout.pool_bytes, dtype=torch.uint8, device=META)
    entries = -(-(PROMPT + 64) // layout.attention.tokens_per_entry)
    batch = make_batch(decoding, prefilling, len(spec.state_layers), entries)
    caches = Backend("triton").bind(buffer, layout)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model.forward(batch, caches)

    return step


def measure(device: NoDevice, step: Callable[[], torch.Tensor], steps: int) -> dict[str, float]:
    step()
    before = device.launches
    step()
    launches, times = device.launches - before, []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
    return {
        "launches": launches,
        "median_ms": round(statistics.median(times), 3),
        "p90_ms": round(sorted(times)[int(0.9 * len(times))], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("exclusive", "carve"), default="exclusive", help="of shared_pool")
    parser.add_argument("--decoding", type=int, default=95, help="requests that decode")
    parser.add_argument("--prefilling", type=int, default=4, help=f"prompts of {PROMPT} tokens")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with no_device() as device, ExitStack() as stack:
        for module in ("devices", "gdn_decode.tiles"):
            stack.enter_context(patch(f"hybridcache.kernels.{module}.capability", lambda device: (9, 0)))
        step = make_step(args.mode, args.decoding, args.prefilling)
        found = measure(device, step, args.steps)
        if args.profile:
            profiler = cProfile.Profile()
            profiler.runcall(lambda: [step() for _ in range(20)])
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    row = {"mode": args.mode, "decoding": args.decoding, "prefilling": args.prefilling, **found}
    print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps({"environment": environment(), **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
