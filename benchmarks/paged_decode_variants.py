"""Times the library's paged decode in several layouts and tilings, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/paged_decode_variants.py --out benchmarks/results/variants-paged_decode-final-h100.json

Every figure is one decode, reduction included, among the 12 layers of a CUDA graph. ``library`` is what the library chooses
by itself, in every layout; other tilings are timed in the layouts that lie furthest apart. Each is first compared with the
float64 reference on two rows; one that is wrong or does not build is reported and not timed. Bars: milliseconds on an H100,
and 3 % between layouts.

Candidates that lost are gone from the library, their code is in commit 973e5e9. ``results/variants-paged_decode-h100.json``
(taken at 8095590) has their times beside those of ``library`` as it was then, with a row's programs far apart in launch
order:

* both KV heads in one program, tiles of 64 rows: up to 3.5 % slower at 1x32768, 16x4096 and 64x8192, but 2.4 % faster at
  64x8192 in block_major 8x1; so layouts differ by 1.6 % there instead of 6.3 %. Smaller tiles: 19 % slower to 1.5 % faster;
* the last program of a row reduces, instead of a second launch: 0.057 ms instead of 0.032 at 1x32768, and within 2 % at
  16x4096;
* every launch a dependent one, set up while the one before runs: from 4 % faster to 1 % slower, but between decodes alone;
  in an engine another kernel comes before;
* at 16x4096, 3 splits instead of 4: 3 % slower; 5 splits, two programs a multiprocessor: 7 % slower (both chained).

Programs of one row as neighbours, the library's order since, were timed with chained launches only: from 2 % slower to 1 %
faster than chained launches in the old order, mostly within the spread. The record at commit c9da9e0, under the same name,
holds the tilings of the first round.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.attention import DecodeLaunch, launch_decode
from benchmarks.case import DECODE_LAYOUTS, QWEN3_NEXT_80B, Case
from benchmarks.processes import in_parallel
from benchmarks.timing import measure_copy, time_graph
from hybridcache.kernels.paged_decode import naive
from hybridcache.kernels.paged_decode.tiles import Tuning
from hybridcache.kernels.paged_decode.triton import paged_decode
from hybridcache.kernels.testing import AttentionCase, attention_case, normal, rel_error
from hybridcache.observe.environment import environment

DIMS = QWEN3_NEXT_80B
BARS_MS = {(1, 32_768): 0.034, (16, 4_096): 0.054, (64, 8_192): 0.362, (256, 2_048): 0.365}
LAYOUT_BAR = 1.03
CHECKED_ROWS = 2
TOLERANCE = 1e-2


FAR_APART = ((8, 11, "block_major"), (8, 1, "block_major"), (1_056, 1, "layer_major"))
"""Layouts in which every variant is timed."""


@dataclass(frozen=True)
class Variant:
    name: str
    tuning: Tuning | None = None
    """None: the library's own choice."""


LIBRARY = Variant("library")
VARIANTS = (
    LIBRARY,
    Variant("x1 64 w8 s3", Tuning(64, 8, 3, 1)),
    Variant("x1 32 w4 s3", Tuning(32, 4, 3, 1)),
    Variant("x1 32 w4 s4", Tuning(32, 4, 4, 1)),
    Variant("x4 16 w2 s3", Tuning(16, 2, 3, 4)),
)


def cases() -> list[tuple[Case, tuple[Variant, ...]]]:
    """Every case with what is timed on it."""
    return [
        (Case("paged_decode", (length,) * rows, DIMS, "bfloat16", *at), VARIANTS if at in FAR_APART else (LIBRARY,))
        for at in DECODE_LAYOUTS
        for rows, length in BARS_MS
    ]


def build(generator: torch.Generator, case: Case) -> AttentionCase:
    """The case's requests in a pool of random values."""
    assert case.kernel_block
    assert case.layout
    built = attention_case(
        generator,
        lengths=case.lengths,
        order=case.layout,
        layers=DIMS.attention_layers,
        kernel_block_tokens=case.kernel_block,
        kernel_blocks=case.kernel_blocks,
        kv_heads=DIMS.kv_heads,
        k_dim=DIMS.head_dim,
        v_dim=DIMS.head_dim,
        device="cuda",
        extra_entries=0,
        fill=(),
    )
    built.buffer.view(torch.bfloat16).normal_()
    return built


def measure(
    case: AttentionCase, q_BHD: torch.Tensor, expected: torch.Tensor, variant: Variant, launch: DecodeLaunch
) -> dict[str, Any]:
    """One record; ``error`` says why it was not timed."""
    record: dict[str, Any] = {"variant": variant.name, "tuning": asdict(launch.tuning), "splits": launch.splits}
    tables = (case.kv_table_BN, case.context_len_B, DIMS.head_dim**-0.5)

    def decode(layer: int) -> torch.Tensor:
        return paged_decode(case.buffer, case.layout, layer, q_BHD, *tables, tuning=variant.tuning)

    try:
        record["rel_error"] = rel_error(decode(0)[: len(expected)], expected)
        if not record["rel_error"] <= TOLERANCE:
            return {**record, "error": "wrong result"}
        timing = time_graph([partial(decode, layer) for layer in range(DIMS.attention_layers)])
    except Exception as error:  # a tiling that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    num_bytes = sum(case.lengths) * DIMS.kv_heads * 2 * DIMS.head_dim * 2 + 2 * q_BHD.numel() * 2
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
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    timed = [
        (case, [(variant, DecodeLaunch.of(case, multiprocessors, variant.tuning)) for variant in variants])
        for case, variants in cases()
    ]
    launches = list(dict.fromkeys(launch for _, variants in timed for _, launch in variants))
    for line in in_parallel(launch_decode, launches):
        print(f"does not compile: {line}")
    compiled = time.perf_counter() - started
    copy = measure_copy()
    torch.cuda.empty_cache()
    records: list[dict[str, Any]] = []
    for case, variants in timed:
        built, (rows, length) = build(generator, case), (len(case.lengths), case.lengths[0])
        q_BHD = normal(generator, (rows, DIMS.heads, DIMS.head_dim), built.buffer.device, "bfloat16")
        part = slice(0, CHECKED_ROWS)
        checked = (q_BHD[part], built.kv_table_BN[part], built.context_len_B[part])
        expected = naive.paged_decode(built.buffer, built.layout, 0, *checked, DIMS.head_dim**-0.5)
        about = {"layout": f"{case.layout} {case.kernel_block}x{case.kernel_blocks}", "rows": rows, "length": length}
        about["bar_ms"] = BARS_MS[rows, length]
        records += [{**about, **measure(built, q_BHD, expected, *variant)} for variant in variants]
        del built
        torch.cuda.empty_cache()
    for failed in (record for record in records if "error" in record):
        where = f"{failed['variant']} {failed['rows']}x{failed['length']} {failed['layout']}"
        print(f"{where}: {failed['error'][:300]}")
    for at in FAR_APART:
        name = "{2} {0}x{1}".format(*at)
        print(f"{name}\n{table([record for record in records if record['layout'] == name], 'variant')}")
    chosen = [record for record in records if record["variant"] == LIBRARY.name]
    print(f"{LIBRARY.name}, by layout\n{table(chosen, 'layout')}")
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
