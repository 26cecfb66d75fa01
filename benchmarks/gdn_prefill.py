"""Checks and times GDN prefill, whole and by launch, under several tilings, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/gdn_prefill.py --out benchmarks/results/gdn-prefill.json

Every figure is one call among the SETS of a CUDA graph, each on inputs, scratch memory and states of its own. ``delta`` is
the delta rule (chunks and states, without conv and gates), ``+ckpt`` the same with a state kept every 512 tokens,
``whole`` all four launches. Tilings are built first, all at once. Each is compared with a float64 reference (outputs,
states, rings, checkpoints); one that is wrong or does not build is reported and not timed.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import measure_copy, time_graph
from hybridcache.kernels.gdn_prefill.hopper_state import hopper_state_kernel
from hybridcache.kernels.gdn_prefill.testing import (
    PrefillCase,
    block_errors,
    checkpoint_table,
    checkpointed,
    prefill_case,
    reference64,
)
from hybridcache.kernels.gdn_prefill.tiles import THREE_PROGRAMS, Tiles, choose
from hybridcache.kernels.gdn_prefill.triton import Prefill, gdn_prefill
from hybridcache.kernels.gdn_prefill.triton_chunk import chunk_kernel
from hybridcache.kernels.gdn_prefill.triton_conv import conv_kernel, ring_kernel
from hybridcache.kernels.gdn_prefill.triton_state import state_kernel
from hybridcache.kernels.testing import rel_error
from hybridcache.observe.environment import environment

Record = dict[str, Any]
SETS, INTERVAL, START = 3, 512, 4096
CHANNELS = 8192
SHAPES = {
    "1x2048": [2048],
    "1x8192": [8192],
    "1x32768": [32768],
    "16x1024": [1024] * 16,
    "mixed 8192": [4000, 1, 130, 64, 777, 2048, 31, 1141],
}
BARS_MS = {"1x2048": 0.13, "1x8192": 0.36, "1x32768": 1.30, "16x1024": 0.62}
"""What the delta rule may take on an H100."""
CHECKPOINT_BAR = 1.10
NARROW = Tiles(64, 128, 64, stages=3, state_warps=4, chunk_registers=THREE_PROGRAMS, conv_warps=8)
WIDE = replace(NARROW, value_tile=128, state_warps=8)
GLUON = replace(NARROW, hopper=True)
STATE_TILES = {"v64 w4": NARROW, "v128 w8": WIDE, "hopper": GLUON}
CHUNK_TILES = {"w4": replace(GLUON, chunk_registers=None), "w4 r168": GLUON}
CONV_TILES = {
    "s8 w8": GLUON,
    "s8 w4": replace(GLUON, conv_warps=4),
    "s16 w4": replace(GLUON, conv_steps=16, conv_warps=4),
    "s4 w16": replace(GLUON, conv_steps=4, conv_warps=16),
}
"""By slots that a thread walks down, and warps: 4 channels (8 bytes) a thread, but 8 in ``s8 w4``."""
KERNELS = (conv_kernel, ring_kernel, chunk_kernel, state_kernel, hopper_state_kernel)
CHECK_LENGTHS, CHECK_STARTS = [0, 1, 63, 64, 65, 200, 9, 1100, 5], [7, 0, 1, 63, 64, 100, -1, 0, 1023]


class Expected:
    """One batch with checkpoints at every multiple of 64, and what a float64 reference makes of it."""

    def __init__(self, case: PrefillCase) -> None:
        self.case, self.before = case, case.buffer.clone()
        self.table_BNL = checkpoint_table(case, 0, 64, spare=1)
        self.buffer = case.buffer.clone()
        self.kept = checkpointed(case, 0, 64, self.table_BNL, self.buffer, reference64)
        self.out = reference64(self.buffer, *case.step(0))

    def check(self, name: str, tiles: Tiles | None, tolerance: float) -> Record:
        """Errors of one tiling, and whether two runs agree to the bit."""
        case = self.case
        record: Record = {"check": name, "dtype": str(case.x_TC.dtype), "tiles": tiles and asdict(tiles), "ok": False}

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            case.buffer.copy_(self.before)
            kept: Record = {"checkpoint_table_BNL": self.table_BNL, "checkpoint_interval": 64}
            return gdn_prefill(case.buffer, *case.step(0), **kept, tiles=tiles), case.buffer.clone()

        try:
            (out, after), (again, after_again) = run(), run()
            record["repeats"] = torch.equal(out, again) and torch.equal(after, after_again)
            record["rel_error"] = rel_error(out, self.out)
            expected = self.buffer.clone()
            state, rings = block_errors(case, expected, 0)
            checkpoint, checkpoint_rings = block_errors(case, expected, 0, [entry for _, _, entry in self.kept])
            record |= {"state_rel_error": state, "checkpoint_rel_error": checkpoint, "checkpoints": len(self.kept)}
            record |= {"rings": rings and checkpoint_rings, "rest_untouched": torch.equal(case.buffer, expected)}
            small = all(error <= tolerance for error in (record["rel_error"], state, checkpoint))
            record["ok"] = small and record["repeats"] and record["rings"] and record["rest_untouched"]
        except Exception as error:  # a tiling that this compiler or device refuses must not hide the others
            record["error"] = f"{type(error).__name__}: {error}"[:500]
        return record


def variants() -> dict[str, Tiles]:
    """Every tiling by the name under which it is checked."""
    named = {"conv": CONV_TILES, "chunks": CHUNK_TILES, "states": STATE_TILES}
    return {f"{stage} {name}": tiles for stage, tilings in named.items() for name, tiles in tilings.items()}


def checks(generator: torch.Generator, hung: set[Tiles]) -> list[Record]:
    found: list[Record] = []
    batch: dict[str, Any] = {
        "lengths": CHECK_LENGTHS,
        "starts": CHECK_STARTS,
        "tail": 70,
        "layers": 1,
        "device": "cuda",
    }
    expected = Expected(prefill_case(generator, **batch, pool_bytes=200 * 2_162_688))
    for name, tiles in variants().items():
        ended = tiles not in hung
        found.append(
            expected.check(name, tiles, 1e-2) if ended else {"check": name, "ok": False, "error": "came to no end"}
        )
    exact: dict[str, Any] = {"dtype": "float32", "conv_dtype": "float32", "pool_bytes": 200 * 2_228_224}
    found.append(Expected(prefill_case(generator, **batch, **exact)).check("float32", None, 1e-5))
    for record in found:
        errors = " ".join(
            f"{key.removesuffix('_rel_error')} {record.get(key, math.nan):.1e}"
            for key in ("rel_error", "state_rel_error", "checkpoint_rel_error")
        )
        print(f"{'ok   ' if record['ok'] else 'WRONG'} {record['check']:14} {errors} {record.get('error', '')}")
        if not record["ok"]:
            print(f"      {record}")
    return found


class Timed:
    """One shape: SETS calls for any tiling, each on memory of its own."""

    def __init__(self, generator: torch.Generator, lengths: list[int]) -> None:
        blocks = len(lengths) * (SETS + max(lengths) // INTERVAL + 1) + 3
        self.case = prefill_case(
            generator,
            lengths=lengths,
            starts=[START] * len(lengths),
            layers=SETS,
            device="cuda",
            pool_bytes=blocks * 2_162_688,
        )
        self.xs = [self.case.x_TC.clone() for _ in range(SETS)]

    def calls(self, tiles: Tiles, checkpoints: bool = False) -> list[Prefill]:
        made = []
        for layer, x_TC in enumerate(self.xs):
            at, _, _, *inputs = self.case.step(layer)
            table = checkpoint_table(self.case, layer, INTERVAL) if checkpoints else None
            call = Prefill(self.case.buffer, at, layer, x_TC, *inputs, table, INTERVAL if checkpoints else 0, tiles)
            call.conv()
            call.chunks()
            made.append(call)
        return made


def stages(shape: str, timed: Timed, wrong: set[str]) -> list[Record]:
    """Records of all launches and tilings of one shape."""
    records: list[Record] = []

    def measure(stage: str, name: str, tiles: Tiles, run: Callable[[Prefill], None], checkpoints: bool = False) -> None:
        record: Record = {"shape": shape, "stage": stage, "variant": name, "tiles": asdict(tiles)}
        try:
            calls = timed.calls(tiles, checkpoints)
            timing = time_graph([lambda call=call: run(call) for call in calls * 2])
            record |= {"ms": timing.median_ms, "spread": timing.spread}
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:500]
        records.append(record)

    def delta(call: Prefill) -> None:
        call.chunks()
        call.states()

    def whole(call: Prefill) -> None:
        call.conv()
        call.rings()
        delta(call)

    state, rows = timed.case.state, len(timed.case.lengths)
    default = choose(state.layout, timed.case.x_TC, rows)
    for name, tiles in variants().items():
        stage, variant = name.split(" ", 1)
        if name not in wrong:
            measure(
                stage, variant, tiles, {"conv": Prefill.conv, "chunks": Prefill.chunks, "states": Prefill.states}[stage]
            )
    measure("rings", "", default, Prefill.rings)
    measure("delta", "default", default, delta)
    measure("delta", "default +ckpt", default, delta, checkpoints=True)
    measure("whole", "default", default, whole)
    return records


def build(tiles: Tiles | None) -> None:
    """Compile one tiling's launches, with checkpoints and without, by running them on a short row."""
    case = prefill_case(torch.Generator(), lengths=[70], starts=[0], layers=1, device="cuda", pool_bytes=8 * 2_162_688)
    table_BNL = checkpoint_table(case, 0, 64)
    gdn_prefill(case.buffer, *case.step(0), tiles=tiles)
    gdn_prefill(case.buffer, *case.step(0), checkpoint_table_BNL=table_BNL, checkpoint_interval=64, tiles=tiles)
    torch.cuda.synchronize()


def build_all(seconds: float = 120.0) -> set[Tiles]:
    """All tilings at once, a process each, into Triton's cache on disk. Returns those that came to no end; one that fails is
    reported when it is checked."""
    tilings = dict.fromkeys(variants().values())
    context = multiprocessing.get_context("spawn")
    processes = {tiles: context.Process(target=build, args=(tiles,)) for tiles in tilings}
    for process in processes.values():
        process.start()
    deadline, hung = time.monotonic() + seconds, set()
    for tiles, process in processes.items():
        process.join(max(deadline - time.monotonic(), 0.1))
        if process.is_alive():
            process.kill()
            hung.add(tiles)
    return hung


def resources() -> list[Record]:
    """What the assembler gave every kernel that ran here. ``spills`` are 4-byte words of local memory a thread."""
    found: list[Record] = []
    for kernel in KERNELS:
        for compiled in kernel.device_caches[torch.cuda.current_device()][0].values():
            if compiled.n_regs is not None:
                metadata = compiled.metadata
                record = {"kernel": metadata.name, "warps": metadata.num_warps, "shared": metadata.shared}
                limit = getattr(metadata, "maxnreg", None)
                found.append({**record, "limit": limit, "registers": compiled.n_regs, "spills": compiled.n_spills})
    return found


def table(records: list[Record]) -> str:
    """Microseconds by stage, variant and shape."""
    lines = [f"{'us':24}" + "".join(f"{shape:>12}" for shape in SHAPES)]
    for stage, variant in dict.fromkeys((r["stage"], r["variant"]) for r in records):
        line = f"{stage + ' ' + variant:24}"
        for shape in SHAPES:
            ms = [r.get("ms") for r in records if (r["stage"], r["variant"], r["shape"]) == (stage, variant, shape)]
            line += f"{ms[0] * 1e3:12.1f}" if ms and ms[0] is not None else f"{'failed':>12}"
        lines.append(line)
    return "\n".join(lines)


def verdicts(records: list[Record], copy_bytes: float) -> list[Record]:
    """Each bar and the default's time; the conv's best tiling, and how long copying its inputs and outputs would take."""
    found = []
    for shape, bar in BARS_MS.items():
        ms = {(r["stage"], r["variant"]): r.get("ms", math.inf) for r in records if r["shape"] == shape}
        delta, kept = (ms.get(("delta", variant), math.inf) for variant in ("default", "default +ckpt"))
        conv_ms, conv = min((t, variant) for (stage, variant), t in ms.items() if stage == "conv")
        found.append(
            {
                "shape": shape,
                "bar_ms": bar,
                "delta_ms": delta if delta < math.inf else None,
                "met": delta <= bar,
                "checkpoint_factor": kept / delta if kept < math.inf else None,
                "checkpoint_met": kept <= CHECKPOINT_BAR * delta < math.inf,
                "conv": conv,
                "conv_of_copy": 2 * sum(SHAPES[shape]) * CHANNELS * 2 / copy_bytes * 1e3 / conv_ms,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="to time; all by default"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")
    started, generator = time.perf_counter(), torch.Generator().manual_seed(arguments.seed)
    hung = build_all()
    print(f"built in {time.perf_counter() - started:.0f} s")
    checked = checks(generator, hung)
    print(f"checked in {time.perf_counter() - started:.0f} s")
    wrong = {record["check"] for record in checked if not record["ok"]}
    records: list[Record] = []
    for shape in arguments.shapes:
        records += stages(shape, Timed(generator, SHAPES[shape]), wrong)
        torch.cuda.empty_cache()
    for failed in (record for record in records if "error" in record):
        print(f"{failed['shape']} {failed['stage']} {failed['variant']}: {failed['error'][:300]}")
    print(table(records))
    copy_bytes = measure_copy()
    summary = verdicts(records, copy_bytes) if set(BARS_MS) <= set(arguments.shapes) else []
    for line in summary:
        print(
            f"{line['shape']:10} delta {line['delta_ms'] or math.nan:.3f} of {line['bar_ms']:.2f} ms "
            f"{'met' if line['met'] else 'MISSED'}; checkpoints x{line['checkpoint_factor'] or math.nan:.3f} "
            f"{'met' if line['checkpoint_met'] else 'MISSED'}; conv {line['conv']}: {line['conv_of_copy']:.0%} of a copy"
        )
    kernels = resources()
    for kernel in kernels:
        if kernel["spills"]:
            print(f"SPILLS {kernel}")
    result = {
        "environment": environment(),
        "seconds": time.perf_counter() - started,
        "copy_bytes_per_s": copy_bytes,
        "bars": summary,
        "kernels": kernels,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "checks": checked, "records": records}, indent=1) + "\n")
    print(f"{len(records)} records in {result['seconds']:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
