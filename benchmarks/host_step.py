"""Host time of a decode step: the engine with a model that does nothing, on this machine's CPU.

    python benchmarks/host_step.py [--running 256] [--steps 300] [--strategy shared_pool] [--mode carve] [--spread 64]

Scheduling, memory, packing of the inputs and accounting are real; the forward pass and the device are not. What CUDA adds
(launching a copy, a graph and an event) is not in it. Prompts have ``--spread`` different lengths; with 1, all requests take
new blocks in the same steps.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time

import torch

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.torch_backend import TorchBackend
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config


class NoModel:
    """Logits that are all zero, at no cost."""

    def __init__(self) -> None:
        self.config = shipped_config("qwen3_next_8l")
        self.config.vocab_size = 1024
        self.dtype = torch.bfloat16
        self.device = torch.device("cpu")
        self.waits = None
        self.weight_bytes = 0
        self._logits = torch.zeros(8192, 1, dtype=torch.bfloat16)

    def scratch_bytes(self, tokens: int, rows: int, prefilling: int) -> int:
        return 0

    def forward(self, batch, buffer, layout, backend) -> torch.Tensor:
        rows = batch.num_tokens if batch.logit_index_R is None else batch.logit_index_R.shape[0]
        return self._logits[:rows]


class NoGraph:
    """A graph whose replay does nothing."""

    def __init__(self, run) -> None: ...

    def replay(self) -> None: ...


def make_engine(strategy: str, running: int, prompt: int, output: int, **options: str) -> Engine:
    model = NoModel()
    spec = CacheSpec.from_config(model.config, kv_dtype="bfloat16", state_dtype="float32")
    budget = 3 * running * spec.request_bytes(prompt + output)
    memory = build(strategy, spec=spec, budget_bytes=budget, physical=True, **options)
    config = SchedulerConfig(max_running=running)
    engine = Engine(model, memory, config, TorchBackend(), overlap=True)
    engine.runner.graphs = engine.runner._make_graphs(NoGraph)
    return engine


def measure(strategy: str, running: int, steps: int, spread: int, profile: bool, **options: str) -> dict:
    prompt = 600
    engine = make_engine(strategy, running, prompt, 4 * steps, **options)
    for i in range(running):
        ids = [(7 * i + j) % 1000 for j in range(prompt + i % spread)]
        engine.add_request(ids, SamplingParams(max_tokens=2 * steps, ignore_eos=True))
    while any(seq.num_settled < 2 for seq in engine.sequences):
        engine.step()
    profiler = cProfile.Profile()
    times = []
    for _ in range(steps):
        if profile:
            profiler.enable()
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
        profiler.disable()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    return {
        "strategy": strategy,
        **options,
        "running": running,
        "median_ms": round(statistics.median(times) * 1e3, 3),
        "p90_ms": round(sorted(times)[int(0.9 * len(times))] * 1e3, 3),
        "max_ms": round(max(times) * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--strategy", default="shared_pool")
    parser.add_argument("--mode", help="of shared_pool")
    parser.add_argument("--spread", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    options = {"mode": args.mode} if args.mode else {}
    print(json.dumps(measure(args.strategy, args.running, args.steps, args.spread, args.profile, **options)))


if __name__ == "__main__":
    main()
