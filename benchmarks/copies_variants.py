"""Times the copies of manager blocks: inside the pool under several tunings, and to and from pinned host memory.

    python benchmarks/copies.py --out benchmarks/results/copies.json

Inside the pool the ceiling is a large device-to-device copy, bytes read plus bytes written. Towards the host it is one large
transfer of pinned memory in the same direction.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import measure_copy, time_events, time_graph
from hybridcache.kernels.block_copy import naive as naive_copy
from hybridcache.kernels.block_copy import triton as block_copy
from hybridcache.kernels.host_swap.copy_engine import HostPool, HostSwap
from hybridcache.observe.environment import environment

BLOCK_BYTES, POOL_BLOCKS, MOVED_BLOCKS, LAUNCHES = 2_162_688, 1_024, 64, 4
TUNINGS = [
    block_copy.Tuning(chunk_words, num_warps)
    for chunk_words, num_warps in ((1_024, 4), (2_048, 4), (4_096, 4), (2_048, 8), (4_096, 8), (8_192, 8))
]
LARGE_TRANSFER = 1 << 30
"""Bytes."""


def time_ms(run: Callable[[], Any]) -> float:
    """Median time of one call, by events."""
    return time_events([run]).median_ms


def bus_bandwidth() -> dict[str, float]:
    """Bytes per second of one large transfer of pinned memory, out of the device and into it."""
    host = torch.empty(LARGE_TRANSFER, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(LARGE_TRANSFER, dtype=torch.uint8, device="cuda")
    return {
        "out": LARGE_TRANSFER / time_ms(lambda: host.copy_(device, non_blocking=True)) * 1e3,
        "in": LARGE_TRANSFER / time_ms(lambda: device.copy_(host, non_blocking=True)) * 1e3,
    }


class Benchmark:
    def __init__(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        words = POOL_BLOCKS * BLOCK_BYTES // 8
        self.pool = torch.randint(-(1 << 62), 1 << 62, (words,), generator=generator, device="cuda").view(torch.uint8)
        self.order = torch.randperm(POOL_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
        self.records: list[dict[str, Any]] = []

    def add(self, name: str, milliseconds: float, num_bytes: int, ceiling: float, correct: bool) -> None:
        rate = num_bytes / milliseconds / 1e6
        self.records.append(
            {
                "case": name,
                "us": milliseconds * 1e3,
                "bytes": num_bytes,
                "gb_per_s": rate,
                "ceiling_gb_per_s": ceiling / 1e9,
                "correct": correct,
            }
        )
        state = "" if correct else "  WRONG"
        print(f"{name:44} {milliseconds * 1e3:9.1f} us {rate:7.1f} GB/s {rate * 1e9 / ceiling:6.1%}{state}", flush=True)

    def inside(self) -> None:
        """Scattered blocks to scattered blocks of the pool."""
        ceiling = measure_copy()
        chosen = zip(self.order[:MOVED_BLOCKS], self.order[MOVED_BLOCKS : 2 * MOVED_BLOCKS])
        moves = [(src * BLOCK_BYTES, dst * BLOCK_BYTES, BLOCK_BYTES) for src, dst in chosen]
        expected = self.pool.clone()
        naive_copy.block_copy(expected, moves)
        num_bytes = 2 * MOVED_BLOCKS * BLOCK_BYTES
        for tuning in TUNINGS:
            for _, dst, length in moves:
                self.pool[dst : dst + length].zero_()
            batches = block_copy.plan(self.pool, moves)

            def launch(batches=batches, tuning=tuning) -> None:
                block_copy.run(self.pool, self.pool, batches, tuning)

            launch()
            correct = torch.equal(self.pool, expected)
            name = f"pool, {tuning.chunk_words * 8 >> 10} KiB chunks, {tuning.num_warps} warps"
            self.add(name, time_graph([launch] * LAUNCHES).median_ms, num_bytes, ceiling, correct)
        eager = time_ms(lambda: block_copy.block_copy(self.pool, moves))
        self.add("pool, eager with planning", eager, num_bytes, ceiling, torch.equal(self.pool, expected))

    def host(self) -> None:
        """Scattered blocks to scattered host slots and back."""
        rate = bus_bandwidth()
        host, swap = HostPool(2 * MOVED_BLOCKS, BLOCK_BYTES), HostSwap(self.pool)
        blocks, others = self.order[:MOVED_BLOCKS], self.order[MOVED_BLOCKS : 2 * MOVED_BLOCKS]
        slots = torch.randperm(2 * MOVED_BLOCKS).tolist()
        slots, other_slots = slots[:MOVED_BLOCKS], slots[MOVED_BLOCKS:]
        num_bytes = MOVED_BLOCKS * BLOCK_BYTES

        def out() -> None:
            swap.swap_out(blocks, host, slots).wait()

        def back() -> None:
            swap.swap_in(host, slots, others).wait()

        def both() -> None:
            first = swap.swap_out(blocks, host, slots)
            swap.swap_in(host, other_slots, others).wait()
            first.wait()

        def moved() -> bool:
            torch.cuda.synchronize()
            rows = self.pool.view(-1, BLOCK_BYTES)
            return torch.equal(rows[blocks], rows[others])

        out_ms = time_ms(out)
        back()
        self.add("host, swap out", out_ms, num_bytes, rate["out"], moved())
        self.pool.view(-1, BLOCK_BYTES)[others] = 0
        in_ms = time_ms(back)
        self.add("host, swap in", in_ms, num_bytes, rate["in"], moved())
        swap.swap_out(blocks, host, other_slots)
        self.add("host, both at once", time_ms(both), 2 * num_bytes, rate["out"] + rate["in"], moved())

        moves = [(src * BLOCK_BYTES, dst * BLOCK_BYTES, BLOCK_BYTES) for src, dst in zip(blocks, slots)]
        batches = block_copy.plan_between(self.pool, host.buffer, moves)
        host.buffer.zero_()
        self.kernel(
            "host, kernel out", lambda: block_copy.run(self.pool, host.buffer, batches), rate["out"], back, moved
        )
        moves = [(src * BLOCK_BYTES, dst * BLOCK_BYTES, BLOCK_BYTES) for src, dst in zip(slots, others)]
        inward = block_copy.plan_between(host.buffer, self.pool, moves)
        self.kernel("host, kernel in", lambda: block_copy.run(host.buffer, self.pool, inward), rate["in"], None, moved)

    def kernel(
        self,
        name: str,
        launch: Callable[[], None],
        ceiling: float,
        then: Callable[[], None] | None,
        moved: Callable[[], bool],
    ) -> None:
        """The copy kernel on pinned memory, which the copy engines compete with."""
        others = self.order[MOVED_BLOCKS : 2 * MOVED_BLOCKS]
        self.pool.view(-1, BLOCK_BYTES)[others] = 0
        milliseconds = time_ms(launch)
        if then is not None:
            then()
        self.add(name, milliseconds, MOVED_BLOCKS * BLOCK_BYTES, ceiling, moved())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA copies")
    started = time.perf_counter()
    bench = Benchmark(arguments.seed)
    bench.inside()
    bench.host()
    result = {"environment": environment(), "seconds": time.perf_counter() - started, "records": bench.records}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(bench.records)} records in {result['seconds']:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
