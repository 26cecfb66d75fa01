"""Times causal paged prefill at the shapes of Qwen3-Next-80B-A3B under several tilings.

    python benchmarks/paged_prefill.py --out benchmarks/results/paged-prefill.json

Two kernels (Triton's for every GPU, Gluon's for Hopper), two layouts with shuffled tables, whole prompts and one chunk of a
long prompt. TFLOP/s count the pairs of query and key that causality leaves, ``4 * heads * head_dim`` operations each. The
keys and values lie in the L2 cache where they fit, as they do in a model that has just stored them. Each variant is first
compared with float32 attention; one that is wrong, fails or does not end is reported and not timed. ``sdpa`` is torch's
own attention on contiguous keys and values, for comparison.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybridcache.kernels.paged_prefill import hopper, triton
from hybridcache.kernels.paged_prefill.tiles import Ring, Tile
from hybridcache.kernels.testing import AttentionCase, attention_case, byte_index, normal, rel_error
from hybridcache.observe.environment import environment

HEADS, KV_HEADS, DIM, LAYERS, LAYER = 16, 2, 256, 12, 7
SCALE = DIM**-0.5
TOLERANCE = 1e-2
REPEATS = 10
TIMEOUT_S = 20.0
"""For one measurement; a kernel that waits for a barrier for ever cannot be stopped but with its process."""
LAYOUTS = {"block_major": ("block_major", 8, 11), "layer_major": ("layer_major", 1_056, 1)}
SHAPES = {
    "1x8192": ([8_192], [8_192]),
    "4x2048": ([2_048] * 4, [2_048] * 4),
    "512 of 16384": ([16_384], [512]),
    "1x32768": ([32_768], [32_768]),
}
"""Context lengths and new tokens of the rows."""


@dataclass(frozen=True)
class Variant:
    name: str
    shape: Tile | Ring
    layouts: tuple[str, ...] = ("block_major",)

    def run(self, *inputs: Any) -> torch.Tensor:
        if isinstance(self.shape, Ring):
            return hopper.paged_prefill(*inputs, ring=self.shape)
        return triton.paged_prefill(*inputs, tile=self.shape)


VARIANTS = (
    Variant("triton 128x64 w8 s2", Tile(128, 64, 8, 2), ("block_major", "layer_major")),
    Variant("triton 128x32 w8 s3", Tile(128, 32, 8, 3)),
    Variant("triton 128x32 w8 s4", Tile(128, 32, 8, 4), ("block_major", "layer_major")),
    Variant("triton 128x32 w8 s5", Tile(128, 32, 8, 5)),
    Variant("triton 64x32 w4 s3", Tile(64, 32, 4, 3)),
    Variant("triton 64x32 w8 s2", Tile(64, 32, 8, 2)),
    Variant("triton 64x64 w8 s2", Tile(64, 64, 8, 2)),
    Variant("gluon 64 s2 r224", Ring(64, 2, 224, 56), ("block_major", "layer_major")),
    Variant("gluon 64 s2 r232", Ring(64, 2, 232, 40)),
    Variant("gluon 32 s4 r232", Ring(32, 4, 232, 40)),
)


class Stuck(RuntimeError):
    """The device did not finish in time."""


def finish(event: torch.cuda.Event) -> None:
    """Wait for an event.

    Raises:
        Stuck: it is not reached within ``TIMEOUT_S``.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not event.query():
        if time.monotonic() > deadline:
            raise Stuck(f"no end after {TIMEOUT_S:.0f} s")
        time.sleep(1e-4)


def time_ms(run: Callable[[], Any]) -> float:
    """Median time of one call, by events, after a warm-up."""
    for _ in range(3):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    finish(marks[-1][1])
    return median(start.elapsed_time(end) for start, end in marks)


@dataclass
class Work:
    """One shape in one layout: inputs of a prefill, and float32 attention on the same keys and values."""

    case: AttentionCase
    queries: list[int]
    inputs: tuple[Any, ...]
    expected_THD: torch.Tensor

    @property
    def operations(self) -> int:
        pairs = sum(
            queries * length - queries * (queries - 1) // 2 for length, queries in zip(self.case.lengths, self.queries)
        )
        return 4 * DIM * HEADS * pairs


def gathered(case: AttentionCase, row: int) -> list[torch.Tensor]:
    """K and V of one row, ``[S, K, D]``."""
    return [case.buffer[byte_index(case, LAYER, row, kv)].view(torch.bfloat16) for kv in range(2)]


def attention(q_QHD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor) -> torch.Tensor:
    """Float32 attention of a row's last tokens, 512 at a time."""
    length, queries, group = k_SKD.shape[0], q_QHD.shape[0], HEADS // KV_HEADS
    out_QHD = torch.empty_like(q_QHD, dtype=torch.float32)
    for at in range(0, queries, 512):
        part = q_QHD[at : at + 512].float()
        seen = length - queries + at + part.shape[0]
        limit_QX = torch.arange(seen - part.shape[0], seen, device=q_QHD.device).repeat_interleave(group)[:, None]
        hidden = torch.arange(seen, device=q_QHD.device) > limit_QX
        for head in range(KV_HEADS):
            heads = slice(head * group, (head + 1) * group)
            score = part[:, heads].reshape(-1, DIM) @ k_SKD[:seen, head].float().T * SCALE
            p = score.masked_fill_(hidden, float("-inf")).softmax(-1)
            out_QHD[at : at + 512, heads] = (p @ v_SKD[:seen, head].float()).view(-1, group, DIM)
    return out_QHD


def prepare(generator: torch.Generator, lengths: list[int], queries: list[int], layout: str) -> Work:
    order, kb, blocks = LAYOUTS[layout]
    case = attention_case(
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
        fill=(LAYER,),
        extra_entries=0,
    )
    q_THD = normal(generator, (sum(queries), HEADS, DIM), case.buffer.device, "bfloat16")
    offsets = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    rows = q_THD.split(queries)
    expected_THD = torch.cat([attention(q_QHD, *gathered(case, row)) for row, q_QHD in enumerate(rows)])
    lengths_BN = (case.kv_table_BN, offsets, case.context_len_B, SCALE, max(queries), max(lengths))
    return Work(case, queries, (case.buffer, case.layout, LAYER, q_THD, *lengths_BN), expected_THD)


def measure(work: Work, run: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """``ms``, ``tflops`` and ``rel_error``, or ``error`` says why there is no time."""
    record: dict[str, Any] = {}
    try:
        started = time.perf_counter()
        out_THD = run()
        done = torch.cuda.Event()
        done.record()
        finish(done)
        record["first_call_s"] = time.perf_counter() - started
        record["rel_error"] = rel_error(out_THD.view_as(work.expected_THD), work.expected_THD)
        if not record["rel_error"] <= TOLERANCE:
            return {**record, "error": "wrong result"}
        milliseconds = time_ms(run)
    except Stuck:
        raise
    except Exception as error:  # a tiling that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    return {**record, "ms": milliseconds, "tflops": work.operations / milliseconds / 1e9}


def library(work: Work) -> Callable[[], torch.Tensor]:
    """Torch's attention on contiguous K and V of rows of one length."""
    rows, queries, length = len(work.queries), work.queries[0], work.case.lengths[0]
    keys, values = zip(*(gathered(work.case, row) for row in range(rows)))
    k, v = (torch.stack(each).transpose(1, 2).contiguous() for each in (keys, values))
    q = work.inputs[3].view(rows, queries, HEADS, DIM).transpose(1, 2)
    if queries == length:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    bias = causal_lower_right(queries, length)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)


def table(records: list[dict[str, Any]], layout: str) -> str:
    """TFLOP/s by variant and shape; the best of a column is marked."""
    cells = {(r["variant"], r["shape"]): r for r in records if r["layout"] == layout}
    best = {s: max((r.get("tflops", 0.0) for (_, shape), r in cells.items() if shape == s), default=0) for s in SHAPES}
    lines = [f"{layout + ', TFLOP/s':22}" + "".join(f"{shape:>14}" for shape in SHAPES) + f"{'rel_error':>11}"]
    for name in dict.fromkeys(variant for variant, _ in cells):
        line, worst = f"{name:22}", 0.0
        for shape in SHAPES:
            record = cells.get((name, shape), {})
            worst = max(worst, record.get("rel_error", 0.0))
            text = f"{record['tflops']:.0f}" if "tflops" in record else "failed" if record else ""
            line += f"{text:>13}" + ("*" if record.get("tflops") == best[shape] and record else " ")
        lines.append(f"{line}{worst:>11.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")
    started, generator = time.perf_counter(), torch.Generator().manual_seed(arguments.seed)
    variants = [variant for variant in VARIANTS if arguments.only in variant.name]
    records: list[dict[str, Any]] = []

    def write(note: str | None = None) -> None:
        result = {"environment": environment(), "seconds": time.perf_counter() - started, "note": note}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**result, "records": records}, indent=1) + "\n")
        for failed in (record for record in records if "error" in record):
            print(f"{failed['variant']} {failed['shape']} {failed['layout']}: {failed['error'][:400]}")
        for layout in LAYOUTS:
            print(table(records, layout))
        print(f"{len(records)} records in {result['seconds']:.0f} s: {arguments.out}", flush=True)

    works = {
        (layout, shape): prepare(generator, lengths, queries, layout)
        for layout in LAYOUTS
        for shape, (lengths, queries) in SHAPES.items()
    }
    for shape in SHAPES if not arguments.only else ():
        work = works["block_major", shape]
        about = {"variant": "sdpa", "shape": shape, "layout": "block_major"}
        records.append({**about, **measure(work, library(work))})
        torch.cuda.empty_cache()
    # Variant by variant: one that never ends costs nothing but those behind it.
    for variant in variants:
        for layout in variant.layouts:
            for shape in SHAPES:
                work = works[layout, shape]
                about = {"variant": variant.name, "shape": shape, "layout": layout, "tile": asdict(variant.shape)}
                try:
                    records.append({**about, **measure(work, partial(variant.run, *work.inputs))})
                except Stuck as error:
                    records.append({**about, "error": str(error)})
                    write("ended early: the device is stuck")
                    sys.stdout.flush()
                    os._exit(3)
    write()


if __name__ == "__main__":
    main()
