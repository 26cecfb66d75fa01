"""What steps cost the host, on this machine's CPU and without a device.

    python -m benchmarks.host step [--running 256] [--strategy shared_pool] [--mode carve] [--spread 64]
    python -m benchmarks.host launch [--mode carve] [--decoding 95] [--prefilling 4]

``step``: decode steps of the engine with a model that does nothing. Scheduling, memory, packing of the inputs and accounting
are real; what CUDA adds (launching a copy, a graph and an event) is not in it. Prompts have ``--spread`` different lengths;
with 1, all requests take new blocks in the same steps.

``launch``: a step that prefills, operation by operation: Qwen3-Next cut to 8 layers on tensors without memory, where Triton
compiles for Hopper and launches nothing. Packing is not in it, nor what CUDA takes of a launch. Tensors without memory make
some of PyTorch's operations slower than CUDA's are: compare two runs on one machine.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import Backend, make_backend
from hybridcache.kernels.batch import StepBatch
from hybridcache.observe.environment import environment
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config

MODEL = "qwen3_next_8l"
META = torch.device("meta")
PROMPT = 2048
"""Tokens of a prompt whose launch is timed."""
STEP_PROMPT = 600


# -- decode steps ----------------------------------------------------------------------------------------------------------


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
    budget = 3 * running * spec.request_bytes(STEP_PROMPT + 4 * steps)
    memory = build(strategy, spec=spec, budget_bytes=budget, physical=True, **options)
    engine = Engine(model, memory, SchedulerConfig(max_running=running), make_backend("torch", "cpu"), overlap=True)  # type: ignore[arg-type]
    engine.runner.graphs = engine.runner._make_graphs(NoGraph)
    for i in range(running):
        ids = [(7 * i + j) % 1000 for j in range(STEP_PROMPT + i % spread)]
        engine.add_request(ids, SamplingParams(max_tokens=2 * steps, ignore_eos=True))
    while any(seq.num_settled < 2 for seq in engine.sequences):
        engine.step()
    return engine.step


# -- launches --------------------------------------------------------------------------------------------------------------


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return (1, 1, 32, 0, 1024)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


class NoDevice:
    """A driver for Triton that compiles for a Hopper GPU and launches nothing."""

    utils = _Utils()

    def __init__(self) -> None:
        self.launches = 0
        self.last: tuple[Any, ...] = ()
        """What the last launch was given: grid, stream, function, metadata, hooks, then the kernel's arguments."""

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What launches a compiled kernel."""
        return self._launch

    def _launch(self, *args: Any) -> None:
        self.last = args
        self.launches += 1

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def no_device() -> Iterator[NoDevice]:
    """Triton's driver while the context lasts, once in a process: what it compiled keeps to it, and must not be launched on a
    device later, for it has been loaded nowhere."""
    from triton.runtime.driver import driver

    before, pretended = driver._active, NoDevice()  # the default driver cannot be asked for where there is no device
    driver.set_active(pretended)
    try:
        yield pretended
    finally:
        driver._active = before


def make_batch(decoding: int, prefilling: int, state_layers: int, entries: int) -> StepBatch:
    """A step of one token each and prompts, the oldest tokens first."""
    tokens, rows = decoding + prefilling * PROMPT, decoding + prefilling
    table = torch.empty((rows, state_layers + entries), dtype=torch.int32, device=META)

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    return StepBatch(
        token_ids_T=empty(tokens, torch.int64),
        position_T=empty(tokens, torch.int64),
        row_T=empty(tokens),
        kv_table_BN=table[:, state_layers:],
        state_read_BL=table[:, :state_layers],
        state_write_BL=table[:, :state_layers],
        context_len_B=empty(rows),
        prefill_cu_seqlens=empty(prefilling + 1),
        prefill_start_P=empty(prefilling),
        logit_index_R=empty(rows, torch.int64),
        num_decode=decoding,
        max_prefill_len=PROMPT if prefilling else 0,
        max_context_len=PROMPT,
    )


def launch_step(mode: str, decoding: int, prefilling: int) -> Callable[[], torch.Tensor]:
    """The forward pass of a step, within :func:`no_device`."""
    from models.qwen3_next.model import Qwen3Next

    config = shipped_config(MODEL)
    model = Qwen3Next(config, torch.bfloat16, META).requires_grad_(False)
    spec = CacheSpec.from_config(config, kv_dtype="bfloat16", state_dtype="float32")
    layout = build("shared_pool", spec=spec, budget_bytes=2 << 30, physical=True, mode=mode).layout
    buffer = torch.empty(layout.pool_bytes, dtype=torch.uint8, device=META)
    entries = -(-(PROMPT + 64) // layout.attention.tokens_per_entry)
    batch = make_batch(decoding, prefilling, len(spec.state_layers), entries)
    caches = Backend("triton").bind(buffer, layout)  # type: ignore[abstract]

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model.forward(batch, caches)

    return step


# -- measurement -----------------------------------------------------------------------------------------------------------


def measure(step: Callable[[], object], steps: int, profiler: cProfile.Profile | None = None) -> dict[str, float]:
    """Milliseconds of a step."""
    times = []
    for _ in range(steps):
        if profiler:
            profiler.enable()
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
        if profiler:
            profiler.disable()
    spots = {
        "median_ms": statistics.median(times),
        "p90_ms": sorted(times)[int(0.9 * len(times))],
        "max_ms": max(times),
    }
    return {name: round(value, 3) for name, value in spots.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "launch"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mode", choices=("exclusive", "carve"), help="of shared_pool")
    parser.add_argument("--strategy", default="shared_pool", help="step: of the engine")
    parser.add_argument("--running", type=int, default=256, help="step: requests")
    parser.add_argument("--spread", type=int, default=64, help="step: different lengths of prompts")
    parser.add_argument("--decoding", type=int, default=95, help="launch: requests that decode")
    parser.add_argument("--prefilling", type=int, default=4, help=f"launch: prompts of {PROMPT} tokens")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    profiler = cProfile.Profile() if args.profile else None
    with ExitStack() as stack:
        if args.what == "step":
            options = {"mode": args.mode} if args.mode else {}
            step = decode_step(args.strategy, args.running, args.steps, args.spread, **options)
            row: dict[str, Any] = {"strategy": args.strategy, **options, "running": args.running}
        else:
            device, mode = stack.enter_context(no_device()), args.mode or "exclusive"
            for module in ("devices", "gdn_decode.tiles"):
                stack.enter_context(patch(f"hybridcache.kernels.{module}.capability", lambda device: (9, 0)))
            launched = launch_step(mode, args.decoding, args.prefilling)
            launched()
            before = device.launches
            launched()
            row = {"mode": mode, "decoding": args.decoding, "prefilling": args.prefilling}
            row["launches"], step = device.launches - before, launched
        row |= measure(step, args.steps, profiler)
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps({"environment": environment(), **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
