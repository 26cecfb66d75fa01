"""Times kernels under several cuts beside the one that the library chooses, at the shapes of Qwen3-Next-80B-A3B.

    python -m benchmarks.variants --out FILE [--operations gdn_decode paged_prefill] [--only gluon]

One table: an operation, its cases, and by each the variants of its kernels. They are checked and timed as experiment
``kernels`` times the library's own (``benchmarks/measure.py``); one that is wrong, does not build or does not end gives a row
that says so. What lost is gone from the library; ``docs/LOG.md`` tells of it and names the commits.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, copies, experts, gated_delta_net
from benchmarks.case import DECODE_LAYOUTS, DECODES, GDN_ROWS, GDN_SLOTS, PREFILLS, QWEN3_NEXT_80B, Case, Lengths
from benchmarks.measure import Bench, Row, compile_case, failed, isolated_ceilings
from benchmarks.processes import in_parallel, isolated
from benchmarks.work import Setup, Work
from hybridcache.observe.environment import environment

DIMS = QWEN3_NEXT_80B
Variants = dict[str, Any]
"""Variants by name: what the operation's builder takes as ``more``."""


def gdn_decode() -> Iterator[tuple[Case, Variants]]:
    """Tiles that wait in registers (widened to float32), or in shared memory as they are (``cp.async``, on Hopper)."""
    from hybridcache.kernels.gdn_decode.tiles import SharedTiles, Tiles

    found: Variants = {}
    for block, warps in ((32, 1), (64, 2)):
        for first, evict in ((False, False), (True, False), (False, True), (True, True)):
            name = f"registers v{block} w{warps}{' first' * first}{' evict' * evict}"
            found[name] = Tiles(block, warps, dependent_launch=True, conv_first=first, evict_first=evict)
    staged = (
        (128, 4, 1, False),
        (128, 4, 2, True),
        (128, 4, 4, False),
        (128, 4, 4, True),
        (128, 4, 8, True),
        (64, 2, 1, False),
    )
    for block, warps, chunks, evict in staged:
        name = f"cp.async v{block} w{warps} c{chunks}{' evict' * evict}"
        found[name] = SharedTiles(block, warps, chunks, dependent_launch=True, evict_first=bool(evict))
    for dtype in ("float32", "bfloat16"):
        for rows in GDN_ROWS:
            yield Case("gdn_decode", (1,) * rows, DIMS, dtype, warm_sets=GDN_SLOTS, with_torch=False), found


def gdn_prefill() -> Iterator[tuple[Case, Variants]]:
    """Tilings of the delta rule (states and chunks), with checkpoints and without, and of the conv."""
    from hybridcache.kernels.gdn_prefill.tiles import THREE_PROGRAMS, Tiles

    narrow = Tiles(64, 128, 64, stages=3, state_warps=4, chunk_registers=THREE_PROGRAMS, conv_warps=8)
    gluon = replace(narrow, hopper=True)
    states = {
        "states v64 w4": narrow,
        "states v128 w8": replace(narrow, value_tile=128, state_warps=8),
        "states gluon": gluon,
        "states gluon, chunks unlimited": replace(gluon, chunk_registers=None),
    }
    conv = {
        "s8 w8": gluon,
        "s8 w4": replace(gluon, conv_warps=4),
        "s16 w4": replace(gluon, conv_steps=16, conv_warps=4),
        "s4 w16": replace(gluon, conv_steps=4, conv_warps=16),
    }
    mixed = (4000, 1, 130, 64, 777, 2048, 31, 1141)
    for lengths in (*PREFILLS, mixed):
        for checkpoint in (0, 512):
            yield Case("gdn_delta", lengths, DIMS, "float32", checkpoint=checkpoint, with_torch=False), states
        yield Case("gdn_conv", lengths, DIMS, "float32", with_torch=False), conv


def paged_decode() -> Iterator[tuple[Case, Variants]]:
    """The library's choice in every layout, other tiles in those that lie furthest apart."""
    from hybridcache.kernels.paged_decode.tiles import Tiles
    from hybridcache.kernels.paged_decode.triton import paged_decode

    cuts = {
        "64 w8 s3": Tiles(64, 8, 3, 1),
        "32 w4 s3": Tiles(32, 4, 3, 1),
        "32 w4 s4": Tiles(32, 4, 4, 1),
        "16 w2 s3 x4": Tiles(16, 2, 3, 4),
    }
    found = {name: partial(paged_decode, tiles=cut) for name, cut in cuts.items()}
    far_apart = (DECODE_LAYOUTS[0], (8, 1, "block_major"), (1_056, 1, "layer_major"))
    for at in DECODE_LAYOUTS:
        for lengths in DECODES:
            case = Case("paged_decode", lengths, DIMS, "bfloat16", *at, with_torch=False)
            yield case, found if at in far_apart else {}


def paged_prefill() -> Iterator[tuple[Case, Variants]]:
    """Triton's kernel and Gluon's, whole prompts and one chunk of a long one."""
    from hybridcache.kernels.paged_prefill import hopper, triton
    from hybridcache.kernels.paged_prefill.tiles import Ring, Tiles

    tiles = (
        (128, 64, 8, 2),
        (128, 32, 8, 3),
        (128, 32, 8, 4),
        (128, 32, 8, 5),
        (64, 32, 4, 3),
        (64, 32, 8, 2),
        (64, 64, 8, 2),
    )
    rings = ((64, 2, 224, 56), (64, 2, 232, 40), (32, 4, 232, 40))
    found: Variants = {}
    for m, n, warps, stages in tiles:
        found[f"triton {m}x{n} w{warps} s{stages}"] = partial(triton.paged_prefill, tiles=Tiles(m, n, warps, stages))
    for keys, stages, products, copies_ in rings:
        ring = Ring(keys, stages, products, copies_)
        found[f"gluon {keys} s{stages} r{products}"] = partial(hopper.paged_prefill, ring=ring)
    shapes: tuple[tuple[Lengths, int], ...] = (((8_192,), 0), ((2_048,) * 4, 0), ((16_384,), 512), ((32_768,), 0))
    for at in (DECODE_LAYOUTS[0], (1_056, 1, "layer_major")):
        for lengths, queries in shapes:
            yield Case("paged_prefill", lengths, DIMS, "bfloat16", *at, queries=queries, with_torch=False), found


def experts_of_a_layer() -> Iterator[tuple[Case, Variants]]:
    """Rows of matrices read per token, and tiles of assignments, for the numbers of tokens that suit them."""
    from hybridcache.kernels.moe import few_tokens, tiled, tiles

    product, cut_of = tiles.Product, tiles.Tiles
    row_cuts = ((8, 512, 4, 8, 4), (4, 1024, 4, 4, 4), (8, 256, 2, 8, 2), (16, 256, 4, 16, 4), (16, 512, 8, 16, 8))
    rows: Variants = {
        f"row by row {gate}x{dims}w{warps} {down}w{down_warps}": partial(
            few_tokens.mixture, tiles=few_tokens.Tiles(gate, dims, warps, down, down_warps)
        )
        for gate, dims, warps, down, down_warps in row_cuts
    }
    rows["row by row"] = few_tokens.mixture
    cuts = {
        "few": tiles.FEW,
        "few narrow": cut_of(16, True, product(64, 128, 4, 4), product(64, 128, 4, 4)),
        "few wide": cut_of(16, True, product(128, 128, 3, 8), product(128, 128, 4, 8)),
        "few unswapped": cut_of(16, False, product(64, 128, 3, 4), product(128, 128, 3, 4)),
        "few 32": cut_of(32, True, product(64, 128, 3, 4), product(128, 128, 3, 4)),
        "some": tiles.SOME,
        "some swapped": cut_of(64, True, product(64, 64, 4, 4), product(128, 64, 4, 4)),
        "some wide": cut_of(64, False, product(128, 64, 4, 8), product(128, 64, 4, 4)),
        "many": tiles.MANY,
        "many wide": cut_of(128, False, product(128, 64, 4, 8), product(256, 64, 3, 8)),
        "many deep": cut_of(128, False, product(128, 64, 3, 8), product(128, 64, 4, 8)),
        "many narrow": cut_of(128, False, product(64, 64, 4, 8), product(64, 64, 4, 4)),
        "many 256": cut_of(256, False, product(64, 64, 4, 8), product(128, 64, 4, 8)),
    }
    suits = {"few": (1, 1024), "some": (64, 4096), "many": (1024, 1 << 20)}
    for tokens in (1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 8192):
        found: Variants = dict(rows) if tokens <= 32 else {}
        for name, cut in cuts.items():
            fewest, most = suits[name.split()[0]]
            if fewest <= tokens <= most:
                found[f"tiles {name}"] = partial(tiled.mixture, tiles=cut)
        yield Case("experts", (tokens,), DIMS, "bfloat16", with_torch=False), found


def block_copy() -> Iterator[tuple[Case, Variants]]:
    """Chunks of a program and its warps, for copies inside the pool."""
    from hybridcache.kernels.block_copy.triton import Tiles

    cuts = ((1_024, 4), (2_048, 4), (4_096, 4), (2_048, 8), (4_096, 8), (8_192, 8))
    found = {f"{words * 8 >> 10} KiB w{warps}": Tiles(words, warps) for words, warps in cuts}
    yield Case("block_copy", (1,) * 64, DIMS, "uint8", with_torch=False), found


def host_copies() -> Iterator[tuple[Case, Variants]]:
    """Copy engines, and the copy kernel on pinned memory, which has no variants."""
    for operation in ("swap_out", "swap_in"):
        yield Case(operation, (1,) * 64, DIMS, "uint8", with_torch=False), {}


def _host_swap(case: Case, setup: Setup, more: Variants) -> Work:
    return copies.swap(case, setup, with_kernel=True)


TABLE: dict[str, tuple[Callable[[], Iterator[tuple[Case, Variants]]], Callable[[Case, Setup, Variants], Work]]] = {
    "gdn_decode": (gdn_decode, gated_delta_net.decode),
    "gdn_prefill": (gdn_prefill, gated_delta_net.prefill),
    "paged_decode": (paged_decode, attention.decode),
    "paged_prefill": (paged_prefill, attention.prefill),
    "experts": (experts_of_a_layer, experts.mixture),
    "block_copy": (block_copy, copies.copy),
    "host_swap": (host_copies, _host_swap),
}
"""Cases with their variants, and what builds them."""


@dataclass(frozen=True)
class Item:
    """One case of the table, as plain data for another process. ``only``: variants whose names contain it."""

    operation: str
    index: int
    only: str = ""

    def entry(self) -> tuple[Case, Variants]:
        case, variants = list(TABLE[self.operation][0]())[self.index]
        return case, {name: value for name, value in variants.items() if self.only in name}

    def build(self, case: Case, setup: Setup) -> Work:
        return TABLE[self.operation][1](case, setup, self.entry()[1])


def items(operations: list[str], only: str = "") -> list[Item]:
    """Cases of the named operations, all where none is named."""
    return [Item(name, i, only) for name in operations or TABLE for i, _ in enumerate(TABLE[name][0]())]


def rows_of(bench: Bench, item: Item) -> Iterator[Row]:
    """Rows of a case's library choice and variants."""
    yield from bench.rows(item.entry()[0], item.build)


def compile_item(item: Item) -> None:
    """Everything of a case, so that the binaries are in Triton's cache."""
    compile_case(item.entry()[0], item.build)


def table(rows: list[Row], operation: str) -> str:
    """Microseconds by variant and case; ``*`` marks a case's best."""
    rows = [row for row in rows if row["op"] == operation and row["l2"] != "warm"]
    cases = dict.fromkeys((row["shape"], row["dtype"], row["kernel_block"], row["layout"]) for row in rows)
    lines = []
    for key in cases:
        found = [row for row in rows if (row["shape"], row["dtype"], row["kernel_block"], row["layout"]) == key]
        best = min((row["median_ms"] for row in found if row["median_ms"]), default=None)
        lines.append(f"{operation} {' '.join(str(part) for part in key if part)}")
        for row in found:
            time_us = f"{row['median_ms'] * 1e3:10.2f} us" if row["median_ms"] else f"failed: {row['error'][:90]}"
            lines.append(f"  {row['impl']:34} {time_us}{' *' if row['median_ms'] == best and best else ''}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--operations", nargs="*", default=[], choices=list(TABLE))
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--limit-s", type=float, default=120.0, help="between two rows of a case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device: variants of CUDA kernels are timed on one")
    started, chosen = time.perf_counter(), items(args.operations, args.only)
    for line in in_parallel(compile_item, chosen):
        print(f"does not compile: {line}")
    bench = Bench(Setup.on(torch.device("cuda")), isolated_ceilings(args.limit_s))
    record: dict[str, Any] = {"environment": environment(), "ceilings": vars(bench.ceilings)}
    rows: list[Row] = []
    for row in isolated(
        partial(rows_of, bench), chosen, lambda at, text: failed(at.entry()[0], text), limit_s=args.limit_s
    ):
        rows.append({name: value for name, value in row.items() if value is not None})
        record |= {"seconds": time.perf_counter() - started, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    whole = [{"l2": None, "kernel_block": None, "layout": None, "median_ms": None, **row} for row in rows]
    for operation in dict.fromkeys(row["op"] for row in whole):
        print(table(whole, operation))
    wrong = [row for row in rows if "error" in row]
    print(f"{len(rows)} rows, {len(wrong)} failed, in {time.perf_counter() - started:.0f} s: {args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
