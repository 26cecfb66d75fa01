"""Times paged decode under several tilings, splits and ways to gather, at the shapes of Qwen3-Next-80B-A3B.

    python benchmarks/paged_decode_variants.py --out benchmarks/results/paged-decode-variants.json

Every figure is one decode, reduction included, among the 12 layers of a CUDA graph. ``masked`` is the kernel that the
library runs, ``split loop`` one that masks nothing but a row's last tile and computes the addresses of K and V once; it
lives here until it proves faster. Splits aim at a number of programs per multiprocessor. Each variant is first compared with
the float64 reference on two rows; one that is wrong or does not build is reported and not timed.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import copy_bandwidth, graph_ms

from hybridcache.dtypes import torch_dtype
from hybridcache.environment import environment
from hybridcache.kernels.addressing import row_strides
from hybridcache.kernels.memory import elements
from hybridcache.kernels.paged_decode import naive
from hybridcache.kernels.paged_decode import triton as library
from hybridcache.kernels.paged_prefill.triton import attend, table_entries
from hybridcache.kernels.testing import AttentionCase, attention_case, normal, rel_error

HEADS, KV_HEADS, DIM, LAYERS = 16, 2, 256, 12
SHAPES = ((1, 32_768), (16, 4_096), (64, 8_192), (256, 2_048))
LAYOUT = ("block_major", 8, 11)
CHECKED_ROWS = 2
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Variant:
    name: str
    split_loop: bool = False
    programs_per_sm: float = 1.0
    keys: int = 32
    num_warps: int = 4
    num_stages: int = 3
    reduce_splits: int = 64
    """Splits that the reduction reads at once, with four warps."""
    shipped: bool = False
    """The library's own choice of everything."""

    def splits(self, rows: int, length: int, multiprocessors: int) -> int:
        wanted = round(self.programs_per_sm * multiprocessors / (rows * KV_HEADS))
        return max(1, min(wanted, length // self.keys))


VARIANTS = (
    Variant("library", shipped=True),
    Variant("masked x1 32 w4 s3"),
    Variant("masked x2 32 w4 s3", programs_per_sm=2),
    Variant("masked x3 32 w4 s2", programs_per_sm=3, num_stages=2),
    Variant("masked x1 64 w8 s3", keys=64, num_warps=8),
    Variant("loop x1 32 w4 s4", split_loop=True, num_stages=4),
    Variant("loop x2 32 w4 s3", split_loop=True, programs_per_sm=2),
    Variant("loop x3 32 w4 s2", split_loop=True, programs_per_sm=3, num_stages=2),
    Variant("loop x1 64 w4 s3", split_loop=True, keys=64),
    Variant("loop x4 16 w4 s3", split_loop=True, programs_per_sm=4, keys=16),
)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["table_ptr", "length_ptr"])
def split_loop_kernel(
    pool_ptr,
    q_ptr,
    table_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    splits,
    q_stride_b: tl.int64,
    q_stride_h: tl.int64,
    table_stride: tl.int64,
    base: tl.int64,
    manager_stride: tl.int32,
    kernel_stride: tl.int32,
    kv_stride: tl.int64,
    k_token_stride: tl.int32,
    v_token_stride: tl.int32,
    k_head_stride: tl.int64,
    v_head_stride: tl.int64,
    TM: tl.constexpr,
    KB: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As the library's ``paged_decode_kernel``, for heads and dims that fill their tiles."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    table_row = table_ptr + row * table_stride
    length = tl.load(length_ptr + row)
    length = tl.where(tl.load(table_row) < 0, 0, length)
    split_tokens = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start = tl.minimum(split * split_tokens, length)
    end = tl.minimum(start + split_tokens, length)
    unmasked = start + (end - start) // BLOCK_N * BLOCK_N

    in_group = tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_K)
    head = kv_head * GROUP + in_group
    inside = in_group < GROUP
    q_offset = row * q_stride_b + head[:, None] * q_stride_h + dim[None, :]
    q = tl.load(q_ptr + q_offset, mask=inside[:, None], other=0.0).to(DOT)
    k_ptr = pool_ptr + (base + kv_head * k_head_stride)
    v_ptr = pool_ptr + (base + kv_stride + kv_head * v_head_stride)
    limit = tl.zeros([BLOCK_H], dtype=tl.int32) + end
    highest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V], dtype=tl.float32)
    entry = table_entries(table_row, start, tl.maximum(end - 1, 0), TM, BLOCK_N)
    # fmt: off
    acc, highest, total, entry = attend(
        acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, start, unmasked, end, limit,
        manager_stride, kernel_stride, k_token_stride, v_token_stride,
        TM, KB, K_DIM, V_DIM, BLOCK_N, BLOCK_K, BLOCK_V, True, DOT, STAGES, False,
    )
    acc, highest, total, entry = attend(
        acc, highest, total, entry, q, scale_log2, k_ptr, v_ptr, table_row, unmasked, end, end, limit,
        manager_stride, kernel_stride, k_token_stride, v_token_stride,
        TM, KB, K_DIM, V_DIM, BLOCK_N, BLOCK_K, BLOCK_V, True, DOT, 1, True,
    )
    # fmt: on
    total = tl.where(total > 0, total, 1.0)
    out = acc / total[:, None]
    out_row = row * (KV_HEADS * GROUP) + head
    out_mask = inside
    if SPLIT:
        out_row = out_row * splits + split
        tl.store(lse_ptr + out_row, highest * scale_log2 + tl.log2(total), mask=inside)
        out_mask = out_mask & (start < end)
    v_dim = tl.arange(0, BLOCK_V)
    tl.store(out_ptr + out_row[:, None] * V_DIM + v_dim[None, :], out, mask=out_mask[:, None])


def arguments(variant: Variant, layout: Any, split: bool) -> dict[str, Any]:
    """Constants and options of the launch."""
    constant = library.constants(layout, HEADS, torch.bfloat16, split=split) | {"BLOCK_N": variant.keys}
    if variant.split_loop:
        constant["STAGES"] = variant.num_stages
    return constant | {"num_warps": variant.num_warps, "num_stages": variant.num_stages}


def decode(
    variant: Variant, case: AttentionCase, layer: int, q_BHD: torch.Tensor, multiprocessors: int
) -> torch.Tensor:
    rows, layout = q_BHD.shape[0], case.layout
    tables = (case.kv_table_BN, case.context_len_B)
    if variant.shipped:
        return library.paged_decode(case.buffer, layout, layer, q_BHD, *tables, DIM**-0.5)
    splits = variant.splits(rows, case.lengths[0], multiprocessors)
    out_BHD = torch.empty_like(q_BHD)
    part, lse = out_BHD, out_BHD
    if splits > 1:
        part = torch.empty((rows, HEADS, splits, DIM), dtype=torch.float32, device=q_BHD.device)
        lse = torch.empty((rows, HEADS, splits), dtype=torch.float32, device=q_BHD.device)
    kernel = split_loop_kernel if variant.split_loop else library.paged_decode_kernel
    kernel[(rows, KV_HEADS, splits)](
        elements(case.buffer, torch_dtype(layout.dtype)),
        q_BHD,
        *tables,
        part,
        lse,
        DIM**-0.5 * library.LOG2_E,
        splits,
        q_BHD.stride(0),
        q_BHD.stride(1),
        case.kv_table_BN.stride(0),
        **row_strides(layout, layer),
        **arguments(variant, layout, splits > 1),
    )
    if splits > 1:
        constant = library.combine_constants(DIM)
        constant["BLOCK_S"] = min(triton.next_power_of_2(splits), variant.reduce_splits)
        grid = (rows * HEADS, DIM // constant["BLOCK_V"])
        library.combine_kernel[grid](part, lse, out_BHD, splits, **constant, num_warps=4)
    return out_BHD


def measure(case: AttentionCase, q_BHD: torch.Tensor, expected: torch.Tensor, variant: Variant) -> dict[str, Any]:
    """One record; ``error`` says why a variant was not timed."""
    rows, length = q_BHD.shape[0], case.lengths[0]
    multiprocessors = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count
    record: dict[str, Any] = {"variant": variant.name, "settings": asdict(variant), "rows": rows, "length": length}
    if not variant.shipped:
        record["splits"] = variant.splits(rows, length, multiprocessors)
    try:
        record["rel_error"] = rel_error(decode(variant, case, 0, q_BHD, multiprocessors)[: len(expected)], expected)
        if not record["rel_error"] <= TOLERANCE:
            return {**record, "error": "wrong result"}
        launches = [lambda i=i: decode(variant, case, i, q_BHD, multiprocessors) for i in range(LAYERS)]
        milliseconds = graph_ms(launches)
    except Exception as error:  # a tiling that this compiler or device refuses must not hide the others
        return {**record, "error": f"{type(error).__name__}: {error}"}
    num_bytes = rows * length * KV_HEADS * 2 * DIM * 2 + 2 * q_BHD.numel() * 2
    return {**record, "ms": milliseconds, "bytes": num_bytes, "tb_per_s": num_bytes / milliseconds / 1e9}


def table(records: list[dict[str, Any]]) -> str:
    """Milliseconds by variant and shape, splits behind them; the best of a column is marked."""
    cells = {(r["variant"], r["rows"], r["length"]): r for r in records}
    lines = [f"{'ms (splits)':22}" + "".join(f"{f'{rows}x{length}':>16}" for rows, length in SHAPES)]
    for variant in VARIANTS:
        line = f"{variant.name:22}"
        for rows, length in SHAPES:
            record = cells.get((variant.name, rows, length), {})
            times = [r["ms"] for r in records if (r["rows"], r["length"]) == (rows, length) and "ms" in r]
            text = f"{record['ms']:.4f} ({record.get('splits', '-')})" if "ms" in record else "failed"
            line += f"{text:>15}" + ("*" if "ms" in record and record["ms"] == min(times) else " ")
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")
    started, generator, records = time.perf_counter(), torch.Generator().manual_seed(args.seed), []
    copy = copy_bandwidth()
    torch.cuda.empty_cache()
    order, kb, blocks = LAYOUT
    for rows, length in SHAPES:
        case = attention_case(
            generator,
            lengths=[length] * rows,
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
        case.buffer.view(torch.bfloat16).normal_()
        q_BHD = normal(generator, (rows, HEADS, DIM), case.buffer.device, "bfloat16")
        part = slice(0, CHECKED_ROWS)
        checked = (q_BHD[part], case.kv_table_BN[part], case.context_len_B[part])
        expected = naive.paged_decode(case.buffer, case.layout, 0, *checked, DIM**-0.5)
        records += [measure(case, q_BHD, expected, variant) for variant in VARIANTS]
        del case
        torch.cuda.empty_cache()
    for failed in (record for record in records if "error" in record):
        print(f"{failed['variant']} {failed['rows']}x{failed['length']}: {failed['error'][:300]}")
    print(table(records))
    result = {"environment": environment(), "copy_gb_per_s": copy / 1e9, "seconds": time.perf_counter() - started}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**result, "records": records}, indent=1) + "\n")
    print(f"copy {copy / 1e9:.0f} GB/s; {len(records)} records in {result['seconds']:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
