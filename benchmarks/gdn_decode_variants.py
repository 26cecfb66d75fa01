"""Times the GDN decode kernels under several cuts, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/gdn_decode_variants.py --out benchmarks/results/variants-gdn_decode-final-h100.json

Every figure is one launch (conv update included) among the 16 of a CUDA graph, each on slots of its own. At one row the 16
launches' states fit in the L2 cache of a Hopper GPU; from 8 rows on they don't. Each variant is compared with the float64
reference first, output and stored state; one that is wrong or does not build is reported and not timed. Worker processes
compile all variants at once before the first is timed.

Two families:

- ``registers`` (``gdn_decode/triton.py``): the tile waits in registers, widened to float32: 8 or 9 warps and 64 KiB of
  bfloat16 state a multiprocessor.
- ``cp.async`` (``gdn_decode/hopper.py``): the tile waits in shared memory: 144 to 192 KiB of state, whatever its type.

Suffixes: ``c1``/``c4`` chunks of a tile, ``cols`` conv weight by column, ``first`` the conv's loads before the state's (always
so in shared memory), ``evict`` L2 hint, ``pdl`` dependent launch. Earlier rounds are kept, and what lost there is gone: on the
kernels of commit 7056eed (``variants-gdn_decode-h100.json``) one TMA copy per chunk, both value heads of a key head in one
program, 8 warps, states packed in registers; on 66a9025 (``variants-gdn_decode-last-h100.json``) warps across the value
dims, and the state's loads before the conv's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import measure_copy, time_graph
from hybridcache.kernels.gdn_decode import naive
from hybridcache.kernels.gdn_decode.staging import Staging
from hybridcache.kernels.gdn_decode.triton import gdn_decode
from hybridcache.kernels.gdn_decode.tuning import Tuning
from hybridcache.kernels.testing import StateCase, rel_error, state_case
from hybridcache.observe.environment import environment
from hybridcache.spec.dtypes import itemsize

LAUNCHES, CHECKED_ROWS = 16, 2
ROWS = (1, 8, 64, 256)
STATE_DTYPES = ("float32", "bfloat16")
WORKER_SECONDS = 40
"""Until a worker that is still compiling, or hangs, is given up."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of the stored state; the output is bfloat16 and gets 1e-2."""


@dataclass(frozen=True)
class Variant:
    name: str
    cut: Tuning | Staging
    weight_by_column: bool = True
    """Conv weight stored as ``[W, C]``: the channels of one column lie side by side and load as vectors."""
    state_dtypes: tuple[str, ...] = STATE_DTYPES

    def launches(self, case: StateCase) -> Callable[[int], torch.Tensor]:
        """One step by its layer."""
        weight_CW = case.conv_weight_CW.t().contiguous().t() if self.weight_by_column else case.conv_weight_CW
        inputs = (case.x_BC, weight_CW, case.a_BV, case.b_BV, case.a_log_V, case.dt_bias_V)

        def step(layer: int) -> torch.Tensor:
            arguments = (case.buffer, case.layout, layer, *inputs, case.state_table_BL, case.position_B)
            return gdn_decode(*arguments, tuning=self.cut)

        return step


def registers(block_v: int, num_warps: int, **more: Any) -> Tuning:
    return Tuning(block_v, num_warps, dependent_launch=True, **more)


def shared(block_v: int, num_warps: int, chunks: int, **more: Any) -> Staging:
    return Staging(block_v, num_warps, chunks, dependent_launch=True, **more)


FIRST: dict[str, Any] = {"conv_first": True}
EVICT: dict[str, Any] = {"evict_first": True}
VARIANTS = (
    Variant("registers v32 w1 cols pdl", registers(32, 1)),
    Variant("registers v32 w1 cols first pdl", registers(32, 1, **FIRST)),
    Variant("registers v32 w1 cols evict pdl", registers(32, 1, **EVICT)),
    Variant("registers v32 w1 cols first evict pdl", registers(32, 1, **FIRST, **EVICT)),
    Variant("registers v64 w2 cols pdl", registers(64, 2)),
    Variant("registers v64 w2 cols first evict pdl", registers(64, 2, **FIRST, **EVICT)),
    Variant("cp.async v128 w4 c1 cols pdl", shared(128, 4, 1)),
    Variant("cp.async v128 w4 c2 cols evict pdl", shared(128, 4, 2, **EVICT)),
    Variant("cp.async v128 w4 c4 cols pdl", shared(128, 4, 4)),
    Variant("cp.async v128 w4 c4 cols evict pdl", shared(128, 4, 4, **EVICT)),
    Variant("cp.async v128 w4 c8 cols evict pdl", shared(128, 4, 8, **EVICT)),
    Variant("cp.async v64 w2 c1 cols pdl", shared(64, 2, 1)),
)


def moved_bytes(case: StateCase, state_dtype: str) -> int:
    """Bytes that one launch must move: states and rings in both directions, activations, weights."""
    rows, channels = case.x_BC.shape
    v_heads, key_dim, value_dim = case.layout.recurrent_shape
    state = v_heads * key_dim * value_dim * itemsize(state_dtype)
    ring = channels * case.layout.conv_kernel * 2  # W - 1 columns read and one written
    activations = 2 * (channels + 2 * v_heads + v_heads * value_dim)
    return rows * (2 * state + ring + activations) + case.conv_weight_CW.numel() * 2


class Checked:
    """Some rows of layer 0 with their bytes before the step and what the reference makes of them."""

    def __init__(self, case: StateCase) -> None:
        self.case, self.rows = case, min(CHECKED_ROWS, case.x_BC.shape[0])
        self.entries = case.state_table_BL[: self.rows, 0].tolist()
        self.before = [self._slot(entry).clone() for entry in self.entries]
        part = slice(0, self.rows)
        inputs = (case.x_BC[part], case.conv_weight_CW, case.a_BV[part], case.b_BV[part])
        tables = (case.state_table_BL[part], case.position_B[part])
        self.out = naive.gdn_decode(case.buffer, case.layout, 0, *inputs, case.a_log_V, case.dt_bias_V, *tables)
        self.after = [self._state(entry).clone() for entry in self.entries]

    def _slot(self, entry: int) -> torch.Tensor:
        address = self.case.layout.address(0, entry)
        return self.case.buffer[address : address + self.case.layout.stride]

    def _state(self, entry: int) -> torch.Tensor:
        return naive.stored_state(self.case.buffer, self.case.layout, 0, entry)[0]

    def errors(self, step: Callable[[int], torch.Tensor]) -> tuple[float, float]:
        """Relative errors of output and stored state after one step of layer 0 from the bytes before it."""
        for entry, before in zip(self.entries, self.before):
            self._slot(entry).copy_(before)
        out_error = rel_error(step(0)[: self.rows], self.out)
        state_errors = [rel_error(self._state(entry), after) for entry, after in zip(self.entries, self.after)]
        return out_error, max(state_errors)


def measure(
    case: StateCase, checked: Checked, variant: Variant, state_dtype: str, refused: str | None
) -> dict[str, Any]:
    """One record; ``error`` says why a variant was not timed. ``refused`` is what kept it from running at all."""
    step = variant.launches(case)
    record: dict[str, Any] = {"variant": variant.name, "cut": asdict(variant.cut)}
    record |= {"rows": case.x_BC.shape[0], "state_dtype": state_dtype, "weight_by_column": variant.weight_by_column}
    if refused:
        return {**record, "error": refused}
    try:
        out_error, state_error = checked.errors(step)
        record |= {"rel_error": out_error, "state_rel_error": state_error}
        if not (out_error <= 1e-2 and state_error <= TOLERANCE[state_dtype]):
            return {**record, "error": "wrong result"}
        milliseconds = time_graph([partial(step, layer) for layer in range(LAUNCHES)]).median_ms
    except Exception as error:  # a tuning that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    num_bytes = moved_bytes(case, state_dtype)
    return {**record, "us": milliseconds * 1e3, "bytes": num_bytes, "gb_per_s": num_bytes / milliseconds / 1e6}


def table(records: Sequence[dict[str, Any]], state_dtype: str) -> str:
    """Microseconds by variant and rows; the best of a column is marked."""
    cells = {(r["variant"], r["rows"]): r.get("us") for r in records if r["state_dtype"] == state_dtype}
    times = {rows: [us for (_, r), us in cells.items() if r == rows and us is not None] for rows in ROWS}
    lines = [f"{state_dtype + ' state, us':42}" + "".join(f"{f'B={rows}':>10}" for rows in ROWS)]
    for variant in offered(state_dtype):
        line = f"{variant.name:42}"
        for rows in ROWS:
            us = cells.get((variant.name, rows))
            mark = "*" if us is not None and us == min(times[rows]) else " "
            line += f"{'failed' if us is None else f'{us:.2f}':>9}{mark}"
        lines.append(line)
    return "\n".join(lines)


def decode_case(generator: torch.Generator, rows: int, state_dtype: str) -> StateCase:
    positions = [100 + row for row in range(rows)]
    return state_case(generator, positions=positions, layers=LAUNCHES, state_dtype=state_dtype, device="cuda")


def offered(state_dtype: str) -> list[Variant]:
    return [variant for variant in VARIANTS if state_dtype in variant.state_dtypes]


def compile_share(part: int, parts: int) -> None:
    """A worker: run every ``parts``-th variant once, so that its binary is in Triton's cache. Prints a line of JSON before
    each and one after it, with its error if it had one."""
    generator = torch.Generator().manual_seed(part)
    for state_dtype in STATE_DTYPES:
        case = decode_case(generator, 1, state_dtype)
        for variant in offered(state_dtype)[part::parts]:
            key = [variant.name, state_dtype]
            print(json.dumps([*key, "did not end"]), flush=True)
            try:
                variant.launches(case)(0)
                torch.cuda.synchronize()
                print(json.dumps([*key, None]), flush=True)
            except Exception as error:
                print(json.dumps([*key, f"{type(error).__name__}: {error}"]), flush=True)
                torch.cuda.synchronize()  # a device that is lost ends this worker, not the measurement


def compile_all() -> dict[tuple[str, str], str]:
    """Compile all variants in worker processes: the errors of those that don't run, by variant and state dtype."""
    parts = max(1, min(12, os.cpu_count() or 1))
    command = [sys.executable, str(Path(__file__).resolve()), "--compile-share"]
    workers = [
        subprocess.Popen([*command, str(part), str(parts)], stdout=subprocess.PIPE, text=True) for part in range(parts)
    ]
    outcome: dict[tuple[str, str], str | None] = {}
    deadline = time.perf_counter() + WORKER_SECONDS
    for worker in workers:
        try:
            lines = worker.communicate(timeout=max(1.0, deadline - time.perf_counter()))[0]
        except subprocess.TimeoutExpired:
            worker.kill()
            lines = worker.communicate()[0]
        for name, state_dtype, error in map(json.loads, filter(None, lines.splitlines())):
            outcome[name, state_dtype] = error
    return {key: error for key, error in outcome.items() if error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile-share", type=int, nargs=2, metavar=("PART", "PARTS"), help="what a worker is told")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")
    if arguments.compile_share:
        compile_share(*arguments.compile_share)
        return
    if arguments.out is None:
        parser.error("--out: name the JSON file to write")

    started, generator, records = time.perf_counter(), torch.Generator().manual_seed(arguments.seed), []
    refused = compile_all()
    compile_seconds = time.perf_counter() - started
    copy = measure_copy()
    torch.cuda.empty_cache()
    for state_dtype in STATE_DTYPES:
        for rows in ROWS:
            case = decode_case(generator, rows, state_dtype)
            checked = Checked(case)
            for variant in offered(state_dtype):
                records.append(measure(case, checked, variant, state_dtype, refused.get((variant.name, state_dtype))))
            del case, checked
            torch.cuda.empty_cache()
    for failed in (record for record in records if "error" in record):
        print(f"{failed['variant']} B={failed['rows']} {failed['state_dtype']}: {failed['error'][:300]}")
    for state_dtype in STATE_DTYPES:
        print(table(records, state_dtype))
    result = {"environment": environment(), "copy_gb_per_s": copy / 1e9, "seconds": time.perf_counter() - started}
    result["compile_seconds"] = compile_seconds
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "records": records}, indent=1) + "\n")
    print(f"copy {copy / 1e9:.0f} GB/s; {len(records)} records in {result['seconds']:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
