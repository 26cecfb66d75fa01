"""Times the library's paged decode under several tunings and in several layouts, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/paged_decode_variants.py --out benchmarks/results/variants-paged_decode-h100.json

Every figure is one decode, reduction included, among the 12 layers of a CUDA graph. ``library`` is what the library chooses
by itself; the layouts are timed with it. Each case is first compared with the float64 reference on two rows; one that is
wrong or does not build is reported and not timed. Bars: milliseconds on an H100, and 3 % between layouts.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybridcache.bench.ceilings import measure_copy
from hybridcache.bench.precompile import in_parallel
from hybridcache.bench.timing import time_graph
from hybridcache.environment import environment
from hybridcache.kernels.paged_decode import naive
from hybridcache.kernels.paged_decode.tiles import Tuning, choose_splits, choose_tuning
from hybridcache.kernels.paged_decode.triton import paged_decode
from hybridcache.kernels.testing import AttentionCase, attention_case, normal, rel_error

HEADS, KV_HEADS, DIM, LAYERS = 16, 2, 256, 12
BARS_MS = {(1, 32_768): 0.034, (16, 4_096): 0.054, (64, 8_192): 0.362, (256, 2_048): 0.365}
LAYOUT_BAR = 1.03
LAYOUTS = (
    ("block_major", 8, 11),
    ("block_major", 16, 11),
    ("block_major", 32, 11),
    ("block_major", 64, 11),
    ("block_major", 8, 1),
    ("layer_major", 1_056, 1),
    ("layer_major", 16, 66),
)
"""Order, kernel block, kernel blocks of a table entry: shared_pool's (and its carve mode's, one kernel block to an entry),
padded_page's and large_block's."""
CHECKED_ROWS = 2
TOLERANCE = 1e-2

Layout = tuple[str, int, int]


@dataclass(frozen=True)
class Variant:
    name: str
    tuning: Tuning | None = None
    """None: the library's own choice."""

    def of(self, case: AttentionCase, rows: int, multiprocessors: int) -> tuple[Tuning, int]:
        """The tuning, and the splits that follow from it."""
        programs = rows * KV_HEADS
        tuning = self.tuning or choose_tuning(case.layout, HEADS, torch.bfloat16, programs, multiprocessors)
        max_tokens = case.kv_table_BN.shape[1] * case.layout.tokens_per_entry
        return tuning, choose_splits(programs, max_tokens, multiprocessors, tuning)


VARIANTS = (
    Variant("library"),
    Variant("x1 64 w4 s3", Tuning(64, 4, 3, 1)),
    Variant("x1 64 w4 s3 no pdl", Tuning(64, 4, 3, 1, dependent_launch=False)),
    Variant("x1 64 w8 s3", Tuning(64, 8, 3, 1)),
    Variant("x1 32 w4 s4", Tuning(32, 4, 4, 1)),
    Variant("x1 32 w4 s5", Tuning(32, 4, 5, 1)),
    Variant("x2 32 w4 s4", Tuning(32, 4, 4, 2)),
    Variant("x4 16 w4 s3", Tuning(16, 4, 3, 4)),
    Variant("x4 16 w2 s3", Tuning(16, 2, 3, 4)),
    Variant("x3 16 w4 s4", Tuning(16, 4, 4, 3)),
)


def build(generator: torch.Generator, layout: Layout, lengths: list[int]) -> AttentionCase:
    order, kb, blocks = layout
    return attention_case(
        generator,
        lengths=lengths,
        order=order,
        layers=LAYERS,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        kv_heads=KV_HEADS,
        k_dim=DIM,
        v_dim=DIM,
        device="cuda",
        extra_entries=0,
        fill=(),
    )


def launch_once(item: tuple[Layout, Tuning, int]) -> None:
    """In a process of its own: compile what ``item`` names by launching it on two short rows."""
    layout, tuning, splits = item
    case = build(torch.Generator().manual_seed(0), layout, [300, 70])
    q_BHD = torch.zeros(2, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    inputs = (case.layout, 0, q_BHD, case.kv_table_BN, case.context_len_B, DIM**-0.5)
    paged_decode(case.buffer, *inputs, num_splits=splits, tuning=tuning)
    torch.cuda.synchronize()


def launches_of(multiprocessors: int) -> list[tuple[Layout, Tuning, int]]:
    """Everything that will be compiled, once each."""
    found: dict[tuple[Layout, Tuning, int], None] = {}
    for rows, length in BARS_MS:
        for layout in LAYOUTS:
            order, kb, blocks = layout
            case = attention_case(
                torch.Generator(),
                lengths=[0],
                order=order,
                layers=1,
                kernel_block_tokens=kb,
                kernel_blocks=blocks,
                extra_entries=-(-length // (kb * blocks)) - 1,
            )
            for variant in VARIANTS if layout == LAYOUTS[0] else VARIANTS[:1]:
                found[(layout, *variant.of(case, rows, multiprocessors))] = None
    return list(found)


def measure(case: AttentionCase, q_BHD: torch.Tensor, expected: torch.Tensor, variant: Variant) -> dict[str, Any]:
    """One record; ``error`` says why it was not timed."""
    rows, length = q_BHD.shape[0], case.lengths[0]
    multiprocessors = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count
    tuning, splits = variant.of(case, rows, multiprocessors)
    record: dict[str, Any] = {"variant": variant.name, "tuning": asdict(tuning), "splits": splits}
    tables = (case.kv_table_BN, case.context_len_B, DIM**-0.5)

    def decode(layer: int) -> torch.Tensor:
        return paged_decode(case.buffer, case.layout, layer, q_BHD, *tables, tuning=variant.tuning)

    try:
        record["rel_error"] = rel_error(decode(0)[: len(expected)], expected)
        if not record["rel_error"] <= TOLERANCE:
            return {**record, "error": "wrong result"}
        timing = time_graph([lambda i=i: decode(i) for i in range(LAYERS)])
    except Exception as error:  # a tiling that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    num_bytes = rows * length * KV_HEADS * 2 * DIM * 2 + 2 * q_BHD.numel() * 2
    rate = num_bytes / timing.median_ms / 1e9
    return {**record, "ms": timing.median_ms, "spread": timing.spread, "bytes": num_bytes, "tb_per_s": rate}


def table(records: list[dict[str, Any]], by: str) -> str:
    """Milliseconds (splits) by ``variant`` or ``layout`` and shape; ``*`` marks those within the bar."""
    lines = [f"{'ms (splits)':24}" + "".join(f"{f'{rows}x{length}':>16}" for rows, length in BARS_MS)]
    lines.append(f"{'bar':24}" + "".join(f"{bar:>15.4f} " for bar in BARS_MS.values()))
    for name in dict.fromkeys(record[by] for record in records):
        line = f"{name:24}"
        for shape, bar in BARS_MS.items():
            record = next(r for r in records if r[by] == name and (r["rows"], r["length"]) == shape)
            text = f"{record['ms']:.4f} ({record['splits']})" if "ms" in record else "failed"
            line += f"{text:>15}" + ("*" if record.get("ms", bar + 1) <= bar else " ")
        lines.append(line)
    return "\n".join(lines)


def layout_spread(records: list[dict[str, Any]]) -> dict[str, float]:
    """Slowest layout over fastest, by shape."""
    found = {}
    for rows, length in BARS_MS:
        times = [r["ms"] for r in records if (r["rows"], r["length"]) == (rows, length) and "ms" in r]
        if times:
            found[f"{rows}x{length}"] = max(times) / min(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")
    started, generator = time.perf_counter(), torch.Generator().manual_seed(args.seed)
    for line in in_parallel(launch_once, launches_of(torch.cuda.get_device_properties(0).multi_processor_count)):
        print(f"does not compile: {line}")
    compiled = time.perf_counter() - started
    copy = measure_copy()
    torch.cuda.empty_cache()
    records: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        for rows, length in BARS_MS:
            case = build(generator, layout, [length] * rows)
            case.buffer.view(torch.bfloat16).normal_()
            q_BHD = normal(generator, (rows, HEADS, DIM), case.buffer.device, "bfloat16")
            part = slice(0, CHECKED_ROWS)
            checked = (q_BHD[part], case.kv_table_BN[part], case.context_len_B[part])
            expected = naive.paged_decode(case.buffer, case.layout, 0, *checked, DIM**-0.5)
            name = f"{layout[0]} {layout[1]}x{layout[2]}"
            about = {"layout": name, "rows": rows, "length": length, "bar_ms": BARS_MS[rows, length]}
            for variant in VARIANTS if layout == LAYOUTS[0] else VARIANTS[:1]:
                records.append({**about, **measure(case, q_BHD, expected, variant)})
            del case
            torch.cuda.empty_cache()
    for failed in (record for record in records if "error" in record):
        where = f"{failed['variant']} {failed['rows']}x{failed['length']} {failed['layout']}"
        print(f"{where}: {failed['error'][:300]}")
    chosen = [record for record in records if record["variant"] == "library"]
    print(table([record for record in records if record["layout"] == chosen[0]["layout"]], "variant"))
    print(table(chosen, "layout"))
    spread = layout_spread(chosen)
    for shape, ratio in spread.items():
        print(f"{shape}: slowest layout over fastest {ratio:.3f}{'' if ratio <= LAYOUT_BAR else '  BEYOND THE BAR'}")
    result = {
        "environment": environment(),
        "copy_gb_per_s": copy / 1e9,
        "seconds": time.perf_counter() - started,
        "compile_seconds": compiled,
        "slowest_layout_over_fastest": spread,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**result, "records": records}, indent=1) + "\n")
    print(f"copy {copy / 1e9:.0f} GB/s; {len(records)} records in {result['seconds']:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
