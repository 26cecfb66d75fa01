"""Two source trees against each other on one GPU: five serving workloads and the host's time, interleaved.

    python -m benchmarks.serving_pair --a ../before --b . --rounds 5 --out FILE

Each tree has a process of its own (``PYTHONPATH`` set to it, ``--fresh``: a new one each round), and both serve in turns, A
B, then B A: ``shared_pool`` in ``carve`` mode, fp32 states, 2 GiB of cache, all requests at once, as experiment
``serve_throughput`` does. Before that each decodes 256 rows out of a larger cache, to time the host's part of such a step.
The record has every sample, medians and the ratio B / A with the spread of each. A tree needs ``hybridcache.LLM``,
``SamplingParams`` and ``llm.engine`` (``add_request``, ``step``, ``run``, ``forget``, ``times``), nothing else; exit status 1
if a median of B is slower than A's by more than ``--allowed``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from hashlib import sha256
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

WORKLOADS = {
    "bs1": (1, 128, 256),
    "chat": (256, 1024, 128),
    "short": (512, 64, 256),
    "long": (64, 4096, 128),
    "mixed": (256, 2048, 64),
}
"""Requests, prompt tokens, output tokens."""
TINY = {"bs1": (1, 16, 32), "chat": (16, 64, 16), "mixed": (8, 128, 8)}
SERVING: dict[str, Any] = {"strategy": "shared_pool", "strategy_options": {"mode": "carve"}}
DECODED_STEPS = 128


# -- in a tree's process: nothing of this project but its public API -----------------------------------------------------


def load(tiny: bool, cache_bytes: int, rows: int) -> Any:
    import gc

    import torch

    from hybridcache import LLM

    gc.collect()  # the one before may lie in a circle
    torch.cuda.empty_cache()
    if tiny:
        return LLM("tiny", **SERVING, cache_bytes=cache_bytes, device="cpu", max_running=rows, max_tokens_per_step=256)
    # Where block tables are charged to the cache: as long as in the measurements of vLLM.
    limit: dict[str, Any] = {"max_model_len": 40_960} if "max_model_len" in signature(LLM.__init__).parameters else {}
    return LLM("qwen3_next_8l", **SERVING, cache_bytes=cache_bytes, max_running=rows, max_tokens_per_step=8192, **limit)


def submit(llm: Any, requests: int, prompt: int, output: int, seed: int) -> list[Any]:
    import numpy as np

    from hybridcache import SamplingParams

    end = min(150_000, llm.model.config.vocab_size)
    ids = np.random.default_rng(seed).integers(min(1000, end // 2), end, (requests, prompt)).tolist()
    return [llm.engine.add_request(row, SamplingParams(max_tokens=output, ignore_eos=True)) for row in ids]


def serve(llm: Any, requests: int, prompt: int, output: int) -> dict[str, Any]:
    """All requests at once, by the wall clock."""
    started = time.perf_counter()
    sequences = submit(llm, requests, prompt, output, seed=0)
    llm.engine.run()
    seconds = time.perf_counter() - started
    tokens = [list(seq.output_ids) for seq in sequences]
    assert all(len(ids) == output for ids in tokens), "a request did not end by its length"
    for seq in sequences:
        llm.engine.forget(seq.seq_id)
    return {"tokens_per_s": requests * output / seconds, "sha256": sha256(json.dumps(tokens).encode()).hexdigest()}


def host_step_ms(llm: Any, rows: int, prompt: int) -> list[float]:
    """The host's time in steps in which all rows decode, the waiting for the device left out."""
    times, found = llm.engine.times, []
    sequences = submit(llm, rows, prompt, DECODED_STEPS, seed=1)
    before = 0
    while any(seq.finish_reason is None for seq in sequences):
        total, wait = times.total_s, times.wait_s
        tokens = len(llm.engine.step().new_tokens)
        if tokens == before == rows:
            found.append((times.total_s - total - times.wait_s + wait) * 1e3)
        before = tokens
    for seq in sequences:
        llm.engine.forget(seq.seq_id)
    return found[4:-4]


def work(tiny: bool) -> None:
    """Answer the commands of standard input, one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes elsewhere
    rows = 8 if tiny else 256
    llm: Any = None
    for line in sys.stdin:
        command, *args = json.loads(line)
        answer: Any = None
        if command == "load":
            llm = None
            llm = load(tiny, args[0], rows)
            answer = sys.modules["hybridcache"].__file__
        elif command == "host":
            answer = host_step_ms(llm, rows, 16 if tiny else 128)
        elif command == "serve":
            answer = serve(llm, *args)
        print(json.dumps(answer), file=answers, flush=True)


# -- the pair ------------------------------------------------------------------------------------------------------------


class Tree:
    """A source tree's process."""

    def __init__(self, root: Path, tiny: bool) -> None:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", *(["--tiny"] if tiny else [])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *command: Any) -> Any:
        """Its answer to one command.

        Raises:
            RuntimeError: the process has ended; why stands in standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise RuntimeError(f"{command}: the tree's process ended with status {self.process.wait()}") from error

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def commit_of(root: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def compare(samples: dict[str, dict[str, list[float]]], allowed: float) -> dict[str, dict[str, Any]]:
    """Medians, spreads and the ratio B / A by workload; ``slower``: by more than is allowed. The host's time counts as its
    inverse."""
    found = {}
    for name, by_tree in samples.items():
        a, b = (median(by_tree[tree]) for tree in "ab")
        ratio = a / b if name == "host_ms" else b / a
        spread = {tree: max(values) / min(values) - 1 for tree, values in by_tree.items()}
        found[name] = {"a": a, "b": b, "ratio": ratio, "spread": spread, "slower": ratio < 1 - allowed}
    return found


def run_pair(roots: dict[str, Path], rounds: int, tiny: bool, fresh: bool, report: Any = print) -> dict[str, Any]:
    """Samples of every workload and of the host's time, by tree, and whether the tokens are equal."""
    workloads = TINY if tiny else WORKLOADS
    cache, large = (2 << 20, 8 << 20) if tiny else (2 << 30, 5 << 30)
    samples: dict[str, dict[str, list[float]]] = {name: {"a": [], "b": []} for name in ("host_ms", *workloads)}
    hashes: dict[str, dict[str, str]] = {name: {} for name in workloads}
    with ExitStack() as stack:
        trees: dict[str, Tree] = {}

        def stop() -> None:
            for tree in trees.values():
                tree.close()
            trees.clear()

        stack.callback(stop)

        def start(name: str) -> None:
            trees[name] = tree = Tree(roots[name], tiny)
            source = Path(tree.ask("load", large))
            if not source.is_relative_to(roots[name]):
                raise RuntimeError(f"tree {name}: hybridcache is that of {source}, not of {roots[name]}")
            samples["host_ms"][name].append(median(tree.ask("host")))
            tree.ask("load", cache)
            for shape in workloads.values():
                tree.ask("serve", *shape)  # untimed: kernels and libraries meet every shape
            report(f"{name}: ready, host {samples['host_ms'][name][-1]:.3f} ms")

        for number in range(rounds):
            order = "ab" if number % 2 == 0 else "ba"
            turns = [(tree, name) for name in workloads for tree in order]
            for tree, name in sorted(turns, key=lambda turn: order.index(turn[0])) if fresh else turns:
                if tree not in trees:
                    if fresh:
                        stop()
                    start(tree)
                answer = trees[tree].ask("serve", *workloads[name])
                samples[name][tree].append(answer["tokens_per_s"])
                hashes[name][tree] = answer["sha256"]
                report(f"round {number}: {tree} {name} {answer['tokens_per_s']:,.1f} tokens/s")
            if fresh:
                stop()
    return {"samples": samples, "equal_tokens": {name: by["a"] == by["b"] for name, by in hashes.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", type=Path, help="the tree before")
    parser.add_argument("--b", type=Path, help="the tree after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--allowed", type=float, default=0.01, help="by how much B's medians may be slower")
    parser.add_argument("--fresh", action="store_true", help="new processes each round, one at a time on the device")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: to try the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.tiny)
        return 0
    if not (args.a and args.b and args.out):
        parser.error("give --a, --b and --out")
    roots = {"a": args.a.resolve(), "b": args.b.resolve()}
    found = run_pair(roots, args.rounds, args.tiny, args.fresh, lambda text: print(text, flush=True))
    verdict = compare(found["samples"], args.allowed)
    commits = {name: commit_of(root) for name, root in roots.items()}
    record = {"command": " ".join(sys.argv), "commits": commits, "rounds": args.rounds, "compared": verdict, **found}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, line in verdict.items():
        mark = "  SLOWER" if line["slower"] else ""
        print(f"{name:8} A {line['a']:12,.3f}  B {line['b']:12,.3f}  ratio {line['ratio']:.4f}{mark}")
    return 1 if any(line["slower"] for line in verdict.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
