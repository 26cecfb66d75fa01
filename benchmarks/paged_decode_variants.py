"""Times the library's paged decode in several ways and in several layouts, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/paged_decode_variants.py --out benchmarks/results/variants-paged_decode-h100.json

Every figure is one decode, reduction included, among the 12 layers of a CUDA graph. ``library`` is what the library chooses
by itself, in every layout; other ways are timed in the layouts that lie furthest apart. Each is first compared with the
float64 reference on two rows; one that is wrong or does not build is reported and not timed. Bars: milliseconds on an H100,
and 3 % between layouts.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybridcache.bench.case import DECODE_LAYOUTS, QWEN3_NEXT_80B, Case
from hybridcache.bench.ceilings import measure_copy
from hybridcache.bench.precompile import in_parallel
from hybridcache.bench.timing import time_graph
from hybridcache.environment import environment
from hybridcache.kernels.paged_decode import naive
from hybridcache.kernels.paged_decode.tiles import Tuning, choose_splits, choose_tuning, head_programs
from hybridcache.kernels.paged_decode.triton import paged_decode
from hybridcache.kernels.testing import AttentionCase, attention_case, normal, rel_error

DIMS = QWEN3_NEXT_80B
BARS_MS = {(1, 32_768): 0.034, (16, 4_096): 0.054, (64, 8_192): 0.362, (256, 2_048): 0.365}
LAYOUT_BAR = 1.03
CHECKED_ROWS = 2
TOLERANCE = 1e-2


ONE, FEW, HALF, MANY = BARS_MS
FAR_APART = ((8, 11, "block_major"), (8, 1, "block_major"), (1_056, 1, "layer_major"))
"""Layouts in which every way is timed."""
NEVER = 1 << 24
"""Where counters start so that no program is ever the last one."""


@dataclass(frozen=True)
class Variant:
    """One way to run the decode.

    Attributes:
        tuning: the library's own choice where None.
        change: fields of the tuning that differ.
        splits: the library's own choice where None.
        shapes: where it is timed.
        everywhere: whether in all layouts.
        reduced: False leaves the reduction out, and times what it costs: the result is not checked.
    """

    name: str
    tuning: Tuning | None = None
    change: tuple[tuple[str, Any], ...] = ()
    splits: int | None = None
    shapes: tuple[tuple[int, int], ...] = (ONE, FEW, HALF, MANY)
    everywhere: bool = False
    reduced: bool = True


CHAINED, NEIGHBOURS, LAST = ("chained", True), ("heads_first", True), ("last_combines", True)
LARGE = (ONE, FEW, HALF)
"""Where one program a multiprocessor is the best there is."""
VARIANTS = (
    Variant("library", everywhere=True),
    Variant("chained", change=(CHAINED,)),
    Variant("chained, heads first", change=(CHAINED, NEIGHBOURS)),
    Variant("x1 32 s3", Tuning(32, 4, 3, 1), shapes=LARGE),
    Variant("x1 16 s6", Tuning(16, 4, 6, 1), shapes=LARGE),
    Variant("x1 32 s4 chained", Tuning(32, 4, 4, 1), (CHAINED, NEIGHBOURS), shapes=LARGE),
    Variant("x1 64 s3 both heads", Tuning(64, 4, 3, 1, True, True, 2), shapes=LARGE, everywhere=True),
    Variant("x1 32 s4 both heads", Tuning(32, 4, 4, 1, True, True, 2), shapes=LARGE),
    Variant("x2 32 s4 both heads", Tuning(32, 4, 4, 2, True, True, 2), shapes=(FEW, MANY)),
    Variant("x4 16 s3 both heads", Tuning(16, 4, 3, 4, True, True, 2), shapes=(MANY,)),
    Variant("last combines", change=(CHAINED, LAST), shapes=(ONE, FEW)),
    Variant("both heads, last comb.", Tuning(64, 4, 3, 1, True, True, 2), (LAST,), shapes=(FEW, HALF)),
)
FIRST_LAYOUT_ONLY = (
    Variant("no reduction", change=(CHAINED, LAST), shapes=(ONE, FEW), reduced=False),
    Variant("3 splits", change=(CHAINED,), splits=3, shapes=(FEW,)),
    Variant("x2 32 s3, 5 splits", Tuning(32, 4, 3, 2, True, True), splits=5, shapes=(FEW,)),
)


@dataclass(frozen=True)
class Launch:
    """A variant of a case as it is launched. Plain data, for another process."""

    case: Case
    tuning: Tuning
    splits: int
    never: bool = False

    @classmethod
    def of(cls, case: Case, variant: Variant, multiprocessors: int) -> "Launch":
        layout, rows = small(case, "cpu").layout, len(case.lengths)
        programs = rows * head_programs(layout, DIMS.heads, torch.bfloat16)
        tuning = variant.tuning or choose_tuning(layout, DIMS.heads, torch.bfloat16, programs, multiprocessors)
        tuning = replace(tuning, **dict(variant.change))
        programs = rows * head_programs(layout, DIMS.heads, torch.bfloat16, tuning.together)
        tokens = -(-max(case.lengths) // layout.tokens_per_entry) * layout.tokens_per_entry
        splits = variant.splits or choose_splits(programs, tokens, multiprocessors, tuning)
        return cls(case, tuning, splits, not variant.reduced)

    @property
    def compiled(self) -> "Launch":
        """Launches that compile to the same have the same."""
        return Launch(replace(self.case, lengths=(300, 70)), self.tuning, min(self.splits, 2))

    def run(self, built: AttentionCase, layer: int, q_BHD: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
        scale = float(DIMS.head_dim**-0.5)
        inputs = (built.buffer, built.layout, layer, q_BHD, built.kv_table_BN, built.context_len_B, scale)
        return paged_decode(*inputs, num_splits=self.splits, tuning=self.tuning, counters=counters)


def cases() -> list[tuple[Case, tuple[Variant, ...]]]:
    """Every case with what is timed on it."""
    return [
        (Case("paged_decode", (shape[1],) * shape[0], DIMS, "bfloat16", *at), timed(at, shape))
        for at in DECODE_LAYOUTS
        for shape in BARS_MS
    ]


def timed(at: tuple[int, int, str], shape: tuple[int, int]) -> tuple[Variant, ...]:
    """Variants of a layout and shape."""
    variants = [v for v in VARIANTS if v.everywhere or at in FAR_APART]
    variants += FIRST_LAYOUT_ONLY if at == FAR_APART[0] else ()
    return tuple(variant for variant in variants if shape in variant.shapes)


def small(case: Case, device: str) -> AttentionCase:
    """The case's layout with two short rows, one layer of them filled."""
    return build(torch.Generator(), replace(case, lengths=(300, 70)), device)


def build(generator: torch.Generator, case: Case, device: str = "cuda") -> AttentionCase:
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
        device=device,
        extra_entries=0,
        fill=(),
    )
    if device == "cuda":
        built.buffer.view(torch.bfloat16).normal_()
    return built


def compile_launch(launch: Launch) -> None:
    """Compile by launching on two short rows."""
    built = small(launch.case, "cuda")
    q_BHD = normal(torch.Generator(), (2, DIMS.heads, DIMS.head_dim), built.buffer.device, "bfloat16")
    launch.run(built, 0, q_BHD, torch.zeros(64, dtype=torch.int32, device="cuda"))
    torch.cuda.synchronize()


def measure(
    built: AttentionCase, q_BHD: torch.Tensor, expected: torch.Tensor, variant: Variant, launch: Launch
) -> dict[str, Any]:
    """One record; ``error`` says why it was not timed."""
    record: dict[str, Any] = {"variant": variant.name, "tuning": asdict(launch.tuning), "splits": launch.splits}
    start = NEVER if launch.never else 0
    counters = torch.full((len(q_BHD) * DIMS.kv_heads,), start, dtype=torch.int32, device="cuda")
    try:
        out_BHD = launch.run(built, 0, q_BHD, counters)
        if variant.reduced:
            record["rel_error"] = rel_error(out_BHD[: len(expected)], expected)
            if not record["rel_error"] <= TOLERANCE:
                return {**record, "error": "wrong result"}
        layers = range(DIMS.attention_layers)
        timing = time_graph([partial(launch.run, built, layer, q_BHD, counters) for layer in layers])
    except Exception as error:  # a tiling that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    num_bytes = sum(built.lengths) * DIMS.kv_heads * 2 * DIMS.head_dim * 2 + 2 * q_BHD.numel() * 2
    rate = num_bytes / timing.median_ms / 1e9
    return {**record, "ms": timing.median_ms, "spread": timing.spread, "bytes": num_bytes, "tb_per_s": rate}


def table(records: list[dict[str, Any]], by: str) -> str:
    """Milliseconds (splits) by ``variant`` or ``layout`` and shape; ``*`` marks those within the bar."""
    lines = [f"{'ms (splits)':24}" + "".join(f"{f'{rows}x{length}':>16}" for rows, length in BARS_MS)]
    lines.append(f"{'bar':24}" + "".join(f"{bar:>15.4f} " for bar in BARS_MS.values()))
    for name in dict.fromkeys(record[by] for record in records):
        line = f"{name:24}"
        for shape, bar in BARS_MS.items():
            found = [r for r in records if r[by] == name and (r["rows"], r["length"]) == shape]
            record = found[0] if found else {}
            text = f"{record['ms']:.4f} ({record['splits']})" if "ms" in record else "failed" if found else "-"
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
    planned = [
        (case, [(variant, Launch.of(case, variant, multiprocessors)) for variant in variants])
        for case, variants in cases()
    ]
    launches = list(dict.fromkeys(launch.compiled for _, variants in planned for _, launch in variants))
    for line in in_parallel(compile_launch, launches):
        print(f"does not compile: {line}")
    compiled = time.perf_counter() - started
    copy = measure_copy()
    torch.cuda.empty_cache()
    records: list[dict[str, Any]] = []
    for case, variants in planned:
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
        print("{2} {0}x{1}".format(*at))
        print(table([r for r in records if r["layout"] == "{2} {0}x{1}".format(*at)], "variant"))
    for variant in (variant for variant in VARIANTS if variant.everywhere):
        print(f"{variant.name}, by layout")
        print(table([record for record in records if record["variant"] == variant.name], "layout"))
    spread = {v.name: layout_spread([r for r in records if r["variant"] == v.name]) for v in VARIANTS}
    for name, found in spread.items():
        ratios = (f"{shape} {ratio:.3f}{'' if ratio <= LAYOUT_BAR else '!'}" for shape, ratio in found.items())
        print(f"slowest layout over fastest, {name}: {', '.join(ratios)}")
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
