"""Times kernels under several cuts beside the one that the library chooses, at the shapes of Qwen3-Next-80B-A3B.

    python -m benchmarks.variants --out FILE [--operations gdn_decode paged_prefill] [--only Ring]

One table: an operation, the kernel's argument that says how it is cut, and the cuts. Cases are those of experiment
``kernels``, checked and timed as it does (``benchmarks/measure.py``); one that is wrong, does not build or does not end gives
a row that says so. What lost is gone from the library; ``docs/LOG.md`` tells of it and names the commits.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import experts
from benchmarks.case import QWEN3_NEXT_80B, Case, cuda_cases
from benchmarks.measure import BUILDERS, Bench, Builder, Row, compile_case, failed, isolated_ceilings
from benchmarks.processes import in_parallel, isolated
from benchmarks.record import arguments, keep
from benchmarks.work import Setup
from hybridcache.kernels.operations import load

EXPERT_TOKENS = (1, 4, 16, 64, 128, 256, 1024, 2048, 8192)
BUILD: dict[str, Any] = {**BUILDERS, "experts": experts.mixture}


@dataclass(frozen=True)
class Axis:
    """Cuts of one kernel.

    Attributes:
        operation: of the cases.
        kernel: module and function that take a cut; empty where the builder takes the cut itself.
        argument: of that function.
        cut: module and class of a cut.
        values: arguments of that class, one tuple per cut.
    """

    operation: str
    kernel: str
    argument: str
    cut: str
    values: tuple[tuple[Any, ...], ...]

    def variants(self) -> dict[str, Any]:
        """By name, what the operation's builder takes as ``more``."""
        make = load(*self.cut.split(":"))
        cuts = {f"{make.__name__}{value}": make(*value) for value in self.values}
        if not self.kernel:
            return cuts
        return {name: partial(load(*self.kernel.split(":")), **{self.argument: cut}) for name, cut in cuts.items()}


def _product(rows: int, swap: bool, gate_up: tuple[int, ...], down: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments of the experts' tiles: rows of a tile, whether it is swapped, and the cuts of its two products."""
    from hybridcache.kernels.moe.tiles import Product

    return rows, swap, Product(*gate_up), Product(*down)


def table() -> list[Axis]:
    """Everything that is timed."""
    registers = tuple(
        (block, warps, evict, None, True) for block, warps, evict in ((32, 1, False), (64, 2, False), (64, 2, True))
    )
    staged = ((128, 4, 2, False, True), (128, 4, 4, False, True), (64, 2, 1, False, True))
    states = ((64, 128, 64, 3, 4), (64, 128, 128, 3, 8), (64, 128, 64, 3, 4, 4, None, 8, 8, True))
    convs = tuple((64, 128, 64, 3, 4, 4, None, warps, steps) for steps, warps in ((8, 8), (8, 4), (16, 4), (4, 16)))
    tiles = ((64, 8, 3, 1), (32, 4, 3, 1), (32, 4, 4, 1), (16, 2, 3, 4))
    plain = ((128, 64, 8, 2), (128, 32, 8, 4), (64, 32, 4, 3), (64, 64, 8, 2))
    copies = ((1_024, 4), (2_048, 4), (4_096, 4), (2_048, 8), (4_096, 8))
    rings = ((64, 2, 224, 56), (64, 2, 232, 40), (32, 4, 232, 40))
    rows = ((8, 512, 4, 8, 4), (4, 1024, 4, 4, 4), (16, 512, 8, 16, 8))
    products = (
        _product(16, True, (64, 128, 3, 4), (128, 128, 3, 4)),
        _product(32, True, (64, 128, 3, 4), (128, 128, 3, 4)),
        _product(64, False, (64, 64, 4, 4), (128, 64, 4, 4)),
        _product(128, False, (128, 64, 4, 8), (128, 64, 3, 8)),
        _product(128, False, (128, 64, 4, 8), (256, 64, 3, 8)),
    )
    return [
        Axis("gdn_decode", "gdn_decode.triton:gdn_decode", "tiles", "gdn_decode.tiles:Tiles", registers),
        Axis("gdn_decode", "gdn_decode.triton:gdn_decode", "tiles", "gdn_decode.tiles:SharedTiles", staged),
        Axis("gdn_delta", "", "tiles", "gdn_prefill.tiles:Tiles", states),
        Axis("gdn_conv", "", "tiles", "gdn_prefill.tiles:Tiles", convs),
        Axis("paged_decode", "paged_decode.triton:paged_decode", "tiles", "paged_decode.tiles:Tiles", tiles),
        Axis("paged_prefill", "paged_prefill.triton:paged_prefill", "tiles", "paged_prefill.tiles:Tiles", plain),
        Axis("paged_prefill", "paged_prefill.hopper:paged_prefill", "ring", "paged_prefill.tiles:Ring", rings),
        Axis("experts", "moe.few_tokens:mixture", "tiles", "moe.few_tokens:Tiles", rows),
        Axis("experts", "moe.tiled:mixture", "tiles", "moe.tiles:Tiles", products),
        Axis("block_copy", "", "tiles", "block_copy.triton:Tiles", copies),
    ]


def cases(operations: list[str]) -> list[Case]:
    """Cases of the named operations, all of the table where none is named."""
    named = {axis.operation for axis in table()} & set(operations or BUILD)
    found = [*cuda_cases(), *(Case("experts", (tokens,), QWEN3_NEXT_80B) for tokens in EXPERT_TOKENS)]
    return [replace(case, with_torch=False) for case in found if case.operation in named]


def variants(operation: str, only: str) -> dict[str, Any]:
    """Those of an operation whose names contain ``only``."""
    found = [item for axis in table() if axis.operation == operation for item in axis.variants().items()]
    return {name: value for name, value in found if only in name}


def _builder(case: Case, only: str) -> Builder:
    return partial(BUILD[case.operation], more=variants(case.operation, only))


def rows_of(bench: Bench, only: str, case: Case) -> Iterator[Row]:
    """Rows of a case's library choice and variants."""
    yield from bench.rows(case, _builder(case, only))


def compile_all(only: str, case: Case) -> None:
    """Everything of a case, so that the binaries are in Triton's cache."""
    compile_case(case, _builder(case, only))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--operations", nargs="*", default=[], choices=[axis.operation for axis in table()])
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--limit-s", type=float, default=120.0, help="between two rows of a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: variants of CUDA kernels are timed on one")
    chosen = cases(args.operations)
    for line in in_parallel(partial(compile_all, args.only), chosen):
        print(f"does not compile: {line}")
    bench, rows = Bench(Setup.on(torch.device("cuda")), isolated_ceilings(args.limit_s)), []
    for row in isolated(partial(rows_of, bench, args.only), chosen, failed, limit_s=args.limit_s):
        rows.append({name: value for name, value in row.items() if value is not None})
        keep(args.out, ceilings=vars(bench.ceilings), rows=rows)
    key = ["op", "shape", "dtype", "kernel_block", "layout"]
    found = pd.DataFrame(rows, columns=[*key, "l2", "impl", "median_ms", "error"]).sort_values([*key, "median_ms"])
    print(found[found["l2"] != "warm"].dropna(axis=1, how="all").to_string(index=False, na_rep="-", max_colwidth=90))
    wrong = [row for row in rows if "error" in row]
    print(f"{len(rows)} rows, {len(wrong)} failed: {args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
