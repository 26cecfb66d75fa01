"""What a change is to pass on a GPU, in one call: tests, checks, kernels, serving, each in a process of its own.

    python -m benchmarks.gpu --out "$OUT" [--only tests kernels] [--limit-s 540]

Every stage writes its record and its output under the folder; ``summary.json`` is rewritten after each, so that a run that is
cut short leaves what it has. A stage that fails or takes too long is told, and the others run. Exit status 1 if one did.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import run_limited
from benchmarks.record import arguments, keep

ROOT = Path(__file__).resolve().parents[1]
BF16 = ("strategies=[shared_pool_carve]", "state_dtype=bfloat16")


@dataclass(frozen=True)
class Stage:
    """Commands that are run one after another, ``{out}`` being the folder, and how long they may take together."""

    commands: tuple[tuple[str, ...], ...]
    limit_s: float


def _module(name: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *args)


def _experiment(name: str, record: str, *overrides: str) -> tuple[tuple[str, ...], ...]:
    """A run, and its results as a record."""
    folder = f"{{out}}/{record}-run"
    run = (sys.executable, "run.py", f"+experiment={name}", "tracking=disabled", f"hydra.run.dir={folder}", *overrides)
    return run, _module("benchmarks.record", folder, "--name", record, "--to", "{out}")


STAGES: dict[str, Stage] = {
    "tests": Stage((_module("tests.checks.gpu_tests", "--out", "{out}/gpu-tests.json"),), 540),
    "kernels": Stage(_experiment("kernels", "kernels")[:1], 400),
    "block_size": Stage(_experiment("kernel_block_size", "kernel_block_size"), 400),
    "serving": Stage(_experiment("serve_throughput", "serve_throughput"), 540),
    "serving_bf16": Stage(_experiment("serve_throughput", "serve_throughput-bf16", *BF16), 300),
    "shared_pool": Stage(_experiment("shared_pool", "shared_pool"), 400),
    "engine": Stage(
        (_module("benchmarks.engine", "--share", "1", "--mode", "carve", "--out", "{out}/engine.json"),), 300
    ),
    "soak": Stage(
        (_module("tests.checks.soak", "--device", "cuda", "--requests", "500", "--out", "{out}/soak.json"),), 200
    ),
    "sanitize": Stage((_module("tests.checks.sanitize", "--out", "{out}/sanitize.json"),), 300),
    "precision": Stage((_module("tests.checks.precision", "--out", "{out}/precision.json"),), 300),
    "variants": Stage((_module("benchmarks.variants", "--out", "{out}/variants.json"),), 540),
}


def run_stage(stage: Stage, name: str, out: Path, limit_s: float) -> dict[str, object]:
    """Status (0 is well) and seconds; its output goes to ``NAME.txt``."""
    started, status = time.perf_counter(), 0
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (out / f"{name}.txt").open("w") as log:
        for command in stage.commands:
            words = [word.format(out=out) for word in command]
            left_s = max(min(stage.limit_s, limit_s) - (time.perf_counter() - started), 1.0)
            status = run_limited(words, left_s, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env)
            if status:
                break
    return {"status": status, "seconds": round(time.perf_counter() - started, 1)}


def run_stages(names: list[str], out: Path, limit_s: float) -> dict[str, dict[str, object]]:
    """Every stage of that name, in the table's order."""
    found: dict[str, dict[str, object]] = {}
    for name in (name for name in STAGES if name in names):
        print(f"{name} ...", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        found[name] = run_stage(STAGES[name], name, out, limit_s)
        keep(out / "summary.json", stages=found)
        print(f"{name}: status {found[name]['status']} after {found[name]['seconds']} s", flush=True)
    return found


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all records")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="these stages")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="of each stage, if less than its own")
    args = parser.parse_args()
    found = run_stages(args.only, args.out.resolve(), args.limit_s)
    return int(any(stage["status"] for stage in found.values()))


if __name__ == "__main__":
    sys.exit(main())
