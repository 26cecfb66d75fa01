"""What a decode step costs the host, on this machine's CPU and without a device.

    python -m benchmarks.host [--running 256] [--strategy shared_pool] [--mode carve] [--spread 64]

The engine decodes with a model that does nothing. Scheduling, memory, packing of the inputs and accounting are real; what CUDA
adds (launching a copy, a graph and an event) is not in it. Prompts have ``--spread`` different lengths; with 1, all requests
take new blocks in the same steps.
"""

import cProfile
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import arguments, keep
from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.kernels.batch import StepBatch
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config

MODEL = "qwen3_next_8l"
PROMPT = 600


class NoModel:
    """Logits that are all zero, at no cost."""

    def __init__(self) -> None:
        self.config = shipped_config(MODEL)
        self.config.vocab_size = 1024
        self.dtype, self.device = torch.bfloat16, torch.device("cpu")
        self.waits, self.weight_bytes = None, 0
        self._logits = torch.zeros(8192, 1, dtype=torch.bfloat16)

    def scratch_bytes(self, tokens: int, rows: int, prefilling: int) -> int:
        return 0

    def forward(self, batch: StepBatch, caches: Any) -> torch.Tensor:
        return self._logits[: batch.num_tokens if batch.logit_index_R is None else batch.logit_index_R.shape[0]]


class NoGraph:
    """A graph whose replay does nothing."""

    def __init__(self, run: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...


def decode_step(strategy: str, running: int, steps: int, spread: int, **options: str) -> Callable[[], object]:
    """The step of an engine in which all requests decode, for about twice as many steps."""
    model = NoModel()
    spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype="float32")
    budget = 3 * running * spec.request_bytes(PROMPT + 4 * steps)
    memory = build(strategy, spec=spec, budget_bytes=budget, physical=True, **options)
    engine = Engine(model, memory, SchedulerConfig(max_running=running), make_backend("torch", "cpu"), overlap=True)  # type: ignore[arg-type]
    engine.runner.graphs = engine.runner._make_graphs(NoGraph)
    for i in range(running):
        ids = [(7 * i + j) % 1000 for j in range(PROMPT + i % spread)]
        engine.add_request(ids, SamplingParams(max_tokens=2 * steps, ignore_eos=True))
    while any(seq.num_settled < 2 for seq in engine.sequences):
        engine.step()
    return engine.step


def measure(step: Callable[[], object], steps: int, profiler: cProfile.Profile | None = None) -> dict[str, float]:
    """Milliseconds of a step: the median, the 90th percentile and the longest."""
    times = []
    for _ in range(steps):
        if profiler:
            profiler.enable()
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
        if profiler:
            profiler.disable()
    names = {"median_ms": 50, "p90_ms": 90, "max_ms": 100}
    return {name: round(float(np.percentile(times, percent)), 3) for name, percent in names.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mode", choices=("exclusive", "carve"), help="of shared_pool")
    parser.add_argument("--strategy", default="shared_pool")
    parser.add_argument("--running", type=int, default=256, help="requests")
    parser.add_argument("--spread", type=int, default=64, help="different lengths of prompts")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profiler = cProfile.Profile() if args.profile else None
    options = {"mode": args.mode} if args.mode else {}
    step = decode_step(args.strategy, args.running, args.steps, args.spread, **options)
    row = {"strategy": args.strategy, **options, "running": args.running, **measure(step, args.steps, profiler)}
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    print(json.dumps(row))
    keep(args.out, **row)


if __name__ == "__main__":
    main()
