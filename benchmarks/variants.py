"""Times kernels under several cuts beside the one that the library chooses, at the shapes of Qwen3-Next-80B-A3B.

    python -m benchmarks.variants --out FILE [--operations gdn_decode paged_prefill] [--only gluon]

One table: an operation, what builds it, its cases and the variants of its kernels. They are checked and timed as experiment
``kernels`` times the library's own (``benchmarks/measure.py``); one that is wrong, does not build or does not end gives a row
that says so. What lost is gone from the library; ``docs/LOG.md`` tells of it and names the commits.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import attention, copies, experts, gated_delta_net
from benchmarks.case import DECODE_LAYOUTS, DECODES, GDN_ROWS, GDN_SLOTS, PREFILLS, QWEN3_NEXT_80B, Case
from benchmarks.measure import Bench, Row, compile_case, failed, isolated_ceilings
from benchmarks.processes import in_parallel, isolated
from benchmarks.record import arguments, keep
from benchmarks.work import Setup, Work

Layout = tuple[int | None, int, str | None]
FAR_APART: tuple[Layout, ...] = (DECODE_LAYOUTS[0], (1_056, 1, "layer_major"))
Entry = tuple[Callable[..., Work], list[Case], dict[str, Any]]
"""What builds an operation, its cases, and by name what the builder takes as ``more``."""


def _case(operation: str, lengths: tuple[int, ...], dtype: str, at: Layout = (None, 1, None), **more: Any) -> Case:
    return Case(operation, lengths, QWEN3_NEXT_80B, dtype, *at, **more, with_torch=False)


def gdn_decode() -> Entry:
    """Tiles that wait in registers (widened to float32), or in shared memory as they are (``cp.async``, on Hopper)."""
    from hybridcache.kernels.gdn_decode.tiles import SharedTiles, Tiles

    dtypes = ("float32", "bfloat16")
    cases = [_case("gdn_decode", (1,) * n, dtype, warm_sets=GDN_SLOTS) for dtype in dtypes for n in GDN_ROWS]
    found: dict[str, Any] = {}
    for evict in (False, True):
        for block, warps in ((32, 1), (64, 2)):
            tiles = Tiles(block, warps, evict, dependent_launch=True)
            found[f"registers v{block} w{warps}{' evict' * evict}"] = tiles
        for block, warps, chunks in ((128, 4, 2), (128, 4, 4), (64, 2, 1)):
            staged = SharedTiles(block, warps, chunks, evict, dependent_launch=True)
            found[f"cp.async v{block} w{warps} c{chunks}{' evict' * evict}"] = staged
    return gated_delta_net.decode, cases, found


def gdn_delta() -> Entry:
    """Tilings of the delta rule, its states and its chunks, with checkpoints and without."""
    from hybridcache.kernels.gdn_prefill.tiles import THREE_PROGRAMS, Tiles

    narrow = Tiles(64, 128, 64, stages=3, state_warps=4, chunk_registers=THREE_PROGRAMS, conv_warps=8)
    cases = [_case("gdn_delta", lengths, "float32", checkpoint=each) for lengths in PREFILLS for each in (0, 512)]
    return gated_delta_net.prefill, cases, {
        "states v64 w4": narrow,
        "states v128 w8": replace(narrow, value_tile=128, state_warps=8),
        "states gluon": replace(narrow, hopper=True),
        "states gluon, chunks unlimited": replace(narrow, hopper=True, chunk_registers=None),
    }  # fmt: skip


def gdn_conv() -> Entry:
    """Steps of a program of the conv, and its warps."""
    from hybridcache.kernels.gdn_prefill.tiles import Tiles

    cuts = ((8, 8), (8, 4), (16, 4), (4, 16))
    tiles = [Tiles(64, 128, 64, stages=3, state_warps=4, conv_steps=steps, conv_warps=warps) for steps, warps in cuts]
    cases = [_case("gdn_conv", lengths, "float32") for lengths in PREFILLS]
    return gated_delta_net.prefill, cases, {f"s{cut.conv_steps} w{cut.conv_warps}": cut for cut in tiles}


def paged_decode() -> Entry:
    """Other tiles than the library's, in the layouts that lie furthest apart."""
    from hybridcache.kernels.paged_decode.tiles import Tiles
    from hybridcache.kernels.paged_decode.triton import paged_decode

    cuts = [Tiles(64, 8, 3, 1), Tiles(32, 4, 3, 1), Tiles(32, 4, 4, 1), Tiles(16, 2, 3, 4)]
    cases = [_case("paged_decode", lengths, "bfloat16", at) for at in FAR_APART for lengths in DECODES]
    return attention.decode, cases, {str(cut): partial(paged_decode, tiles=cut) for cut in cuts}


def paged_prefill() -> Entry:
    """Triton's kernel and Gluon's, whole prompts and one chunk of a long one."""
    from hybridcache.kernels.paged_prefill import hopper, triton
    from hybridcache.kernels.paged_prefill.tiles import Ring, Tiles

    tiles = [Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 4), Tiles(64, 32, 4, 3), Tiles(64, 64, 8, 2)]
    rings = [Ring(64, 2, 224, 56), Ring(64, 2, 232, 40), Ring(32, 4, 232, 40)]
    found: dict[str, Any] = {f"triton {cut}": partial(triton.paged_prefill, tiles=cut) for cut in tiles}
    found |= {f"gluon {ring}": partial(hopper.paged_prefill, ring=ring) for ring in rings}
    shapes = (((8_192,), 0), ((2_048,) * 4, 0), ((16_384,), 512), ((32_768,), 0))
    cases = [_case("paged_prefill", lengths, "bfloat16", at, queries=q) for at in FAR_APART for lengths, q in shapes]
    return attention.prefill, cases, found


def few_experts() -> Entry:
    """Few tokens: rows of matrices read per token, and tiles of assignments."""
    from hybridcache.kernels.moe import few_tokens, tiled, tiles

    rows = [few_tokens.Tiles(8, 512, 4, 8, 4), few_tokens.Tiles(4, 1024, 4, 4, 4), few_tokens.Tiles(16, 512, 8, 16, 8)]
    found: dict[str, Any] = {f"row by row {cut}": partial(few_tokens.mixture, tiles=cut) for cut in rows}
    found |= {"row by row": few_tokens.mixture, "tiles few": partial(tiled.mixture, tiles=tiles.FEW)}
    return experts.mixture, [_case("experts", (n,), "bfloat16") for n in (1, 4, 8, 16, 32)], found


def experts_in_tiles() -> Entry:
    """More tokens: the library's three tiles, and others near them."""
    from hybridcache.kernels.moe import tiled, tiles

    product, tile = tiles.Product, tiles.Tiles
    cuts = tiles.TILES | {
        "few unswapped": tile(16, False, product(64, 128, 3, 4), product(128, 128, 3, 4)),
        "few 32": tile(32, True, product(64, 128, 3, 4), product(128, 128, 3, 4)),
        "some wide": tile(64, False, product(128, 64, 4, 8), product(128, 64, 4, 4)),
        "many wide": tile(128, False, product(128, 64, 4, 8), product(256, 64, 3, 8)),
        "many 256": tile(256, False, product(64, 64, 4, 8), product(128, 64, 4, 8)),
    }
    found = {f"tiles {name}": partial(tiled.mixture, tiles=cut) for name, cut in cuts.items()}
    return experts.mixture, [_case("experts", (n,), "bfloat16") for n in (64, 128, 256, 1024, 2048, 8192)], found


def block_copy() -> Entry:
    """Chunks of a program and its warps, for copies inside the pool."""
    from hybridcache.kernels.block_copy.triton import Tiles

    cuts = ((1_024, 4), (2_048, 4), (4_096, 4), (2_048, 8), (4_096, 8), (8_192, 8))
    found = {f"{words * 8 >> 10} KiB w{warps}": Tiles(words, warps) for words, warps in cuts}
    return copies.copy, [_case("block_copy", (1,) * 64, "uint8")], found


def host_swap() -> Entry:
    """Copy engines, and the copy kernel on pinned memory."""
    cases = [_case(operation, (1,) * 64, "uint8") for operation in ("swap_out", "swap_in")]
    return copies.swap, cases, {"kernel": True}


TABLE: dict[str, Callable[[], Entry]] = {
    entry.__name__: entry
    for entry in (
        gdn_decode, gdn_delta, gdn_conv, paged_decode, paged_prefill, few_experts, experts_in_tiles, block_copy, host_swap,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One case of the table, as plain data for another process. ``only``: variants whose names contain it."""

    operation: str
    index: int
    only: str = ""

    def entry(self) -> tuple[Case, Callable[[Case, Setup], Work], dict[str, Any]]:
        """The case, what builds it, and its variants."""
        build, cases, variants = TABLE[self.operation]()
        chosen = {name: value for name, value in variants.items() if self.only in name}
        return cases[self.index], partial(build, more=chosen), chosen


def items(operations: list[str], only: str = "") -> list[Item]:
    """Cases of the named operations, all where none is named."""
    return [Item(name, i, only) for name in operations or TABLE for i in range(len(TABLE[name]()[1]))]


def rows_of(bench: Bench, item: Item) -> Iterator[Row]:
    """Rows of a case's library choice and variants."""
    yield from bench.rows(*item.entry()[:2])


def compile_item(item: Item) -> None:
    """Everything of a case, so that the binaries are in Triton's cache."""
    compile_case(*item.entry()[:2])


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--operations", nargs="*", default=[], choices=list(TABLE))
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--limit-s", type=float, default=120.0, help="between two rows of a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: variants of CUDA kernels are timed on one")
    chosen = items(args.operations, args.only)
    for line in in_parallel(compile_item, chosen):
        print(f"does not compile: {line}")
    bench, rows = Bench(Setup.on(torch.device("cuda")), isolated_ceilings(args.limit_s)), []
    fail = lambda item, text: failed(item.entry()[0], text)  # noqa: E731
    for row in isolated(partial(rows_of, bench), chosen, fail, limit_s=args.limit_s):
        rows.append({name: value for name, value in row.items() if value is not None})
        keep(args.out, ceilings=vars(bench.ceilings), rows=rows)
    case = ["op", "shape", "dtype", "kernel_block", "layout"]
    table = pd.DataFrame(rows, columns=[*case, "l2", "impl", "median_ms", "error"]).sort_values([*case, "median_ms"])
    print(table[table["l2"] != "warm"].dropna(axis=1, how="all").to_string(index=False, na_rep="-", max_colwidth=90))
    wrong = [row for row in rows if "error" in row]
    print(f"{len(rows)} rows, {len(wrong)} failed: {args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
