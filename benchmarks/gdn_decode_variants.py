"""Times the GDN decode kernel under several tunings, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/gdn_decode_variants.py --out benchmarks/results/gdn-decode-variants.json

Every figure is one launch (conv update included) among the 16 of a CUDA graph, each on slots of its own. At one row the 16
launches' states fit in the L2 cache of a Hopper GPU; from 8 rows on they don't. Each variant is compared with the float64
reference first, output and stored state; one that is wrong or does not build is reported and not timed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import copy_bandwidth, graph_ms

from hybridcache.dtypes import itemsize
from hybridcache.environment import environment
from hybridcache.kernels.gdn_decode import naive
from hybridcache.kernels.gdn_decode.triton import Tuning, gdn_decode
from hybridcache.kernels.testing import StateCase, rel_error, state_case

LAUNCHES, CHECKED_ROWS = 16, 2
ROWS = (1, 8, 64, 256)
STATE_DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of the stored state; the output is bfloat16 and gets 1e-2."""


@dataclass(frozen=True)
class Variant:
    name: str
    tuning: Tuning
    weight_by_column: bool = False
    """Conv weight stored as ``[W, C]``: the channels of one column lie side by side and load as vectors."""


VARIANTS = (
    Variant("v32 w4", Tuning(32, 4)),
    Variant("v32 w2", Tuning(32, 2)),
    Variant("v32 w1", Tuning(32, 1)),
    Variant("v16 w1", Tuning(16, 1)),
    Variant("v8 w1", Tuning(8, 1)),
    Variant("v64 w2", Tuning(64, 2)),
    Variant("v128 w4", Tuning(128, 4)),
    Variant("v32 w1 r200", Tuning(32, 1, max_registers=200)),
    Variant("v32 w1 evict", Tuning(32, 1, evict_first=True)),
    Variant("v32 w1 cols", Tuning(32, 1), weight_by_column=True),
    Variant("v16 w1 cols", Tuning(16, 1), weight_by_column=True),
    Variant("v8 w1 cols pdl", Tuning(8, 1, dependent_launch=True), weight_by_column=True),
    Variant("v32 w1 cols pdl", Tuning(32, 1, dependent_launch=True), weight_by_column=True),
    Variant("v16 w1 cols pdl", Tuning(16, 1, dependent_launch=True), weight_by_column=True),
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


def measure(case: StateCase, checked: Checked, variant: Variant, state_dtype: str) -> dict[str, Any]:
    """One record; ``error`` says why a variant was not timed."""
    weight_CW = case.conv_weight_CW.t().contiguous().t() if variant.weight_by_column else case.conv_weight_CW
    gates = (case.a_BV, case.b_BV, case.a_log_V, case.dt_bias_V)

    def step(layer: int) -> torch.Tensor:
        inputs = (case.layout, layer, case.x_BC, weight_CW, *gates, case.state_table_BL, case.position_B)
        return gdn_decode(case.buffer, *inputs, tuning=variant.tuning)

    record: dict[str, Any] = {"variant": variant.name, "tuning": asdict(variant.tuning)}
    record |= {"rows": case.x_BC.shape[0], "state_dtype": state_dtype, "weight_by_column": variant.weight_by_column}
    try:
        out_error, state_error = checked.errors(step)
        record |= {"rel_error": out_error, "state_rel_error": state_error}
        if not (out_error <= 1e-2 and state_error <= TOLERANCE[state_dtype]):
            return {**record, "error": "wrong result"}
        milliseconds = graph_ms([lambda i=i: step(i) for i in range(LAUNCHES)])
    except Exception as error:  # a tuning that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    num_bytes = moved_bytes(case, state_dtype)
    return {**record, "us": milliseconds * 1e3, "bytes": num_bytes, "gb_per_s": num_bytes / milliseconds / 1e6}


def table(records: Sequence[dict[str, Any]], state_dtype: str) -> str:
    """Microseconds by variant and rows; the best of a column is marked."""
    cells = {(r["variant"], r["rows"]): r.get("us") for r in records if r["state_dtype"] == state_dtype}
    times = {rows: [us for (_, r), us in cells.items() if r == rows and us is not None] for rows in ROWS}
    lines = [f"{state_dtype + ' state, us':24}" + "".join(f"{f'B={rows}':>10}" for rows in ROWS)]
    for variant in VARIANTS:
        line = f"{variant.name:24}"
        for rows in ROWS:
            us = cells.get((variant.name, rows))
            mark = "*" if us is not None and us == min(times[rows]) else " "
            line += f"{'failed' if us is None else f'{us:.2f}':>9}{mark}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")

    started, generator, records = time.perf_counter(), torch.Generator().manual_seed(arguments.seed), []
    copy = copy_bandwidth()
    torch.cuda.empty_cache()
    for state_dtype in STATE_DTYPES:
        for rows in ROWS:
            positions = [100 + row for row in range(rows)]
            case = state_case(generator, positions=positions, layers=LAUNCHES, state_dtype=state_dtype, device="cuda")
            checked = Checked(case)
            records += [measure(case, checked, variant, state_dtype) for variant in VARIANTS]
            del case, checked
            torch.cuda.empty_cache()
    for failed in (record for record in records if "error" in record):
        print(f"{failed['variant']} B={failed['rows']} {failed['state_dtype']}: {failed['error'][:300]}")
    for state_dtype in STATE_DTYPES:
        print(table(records, state_dtype))
    result = {"environment": environment(), "copy_gb_per_s": copy / 1e9, "seconds": time.perf_counter() - started}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "records": records}, indent=1) + "\n")
    print(f"copy {copy / 1e9:.0f} GB/s; {len(records)} records in {result['seconds']:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
