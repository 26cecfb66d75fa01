"""Times the Triton kernels at the shapes of Qwen3-Next-80B-A3B and writes what it measured as JSON.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

Every launch of a timed region works on memory of its own (a layer of its own, together larger than the L2 cache), and the
decode operations run as one CUDA graph, as the engine runs them. Bytes are those that the operation must move, each counted
once per direction. The ceiling is a large device-to-device copy on the same device, bytes read plus bytes written.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hybridcache.dtypes import itemsize
from hybridcache.environment import environment
from hybridcache.kernels.block_copy import naive as naive_copy
from hybridcache.kernels.block_copy import triton as triton_copy
from hybridcache.kernels.gdn_decode import naive as naive_gdn
from hybridcache.kernels.kv_store import naive as naive_store
from hybridcache.kernels.paged_decode import naive as naive_decode
from hybridcache.kernels.qk_norm_rope_store import naive as naive_fused
from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store
from hybridcache.kernels.testing import AttentionCase, attention_case, normal, rel_error, state_case
from hybridcache.kernels.triton_backend import TritonBackend

HEADS, KV_HEADS, DIM, ATTENTION_LAYERS = 16, 2, 256, 12
GDN_LAUNCHES = 16
GDN_ROWS = (1, 8, 64, 256)
DECODE_SHAPES = ((1, 32_768), (16, 4_096), (64, 8_192), (256, 2_048))
DECODE_LAYOUTS = (("block_major", 8, 11), ("layer_major", 1_056, 1))
STORE_TOKENS = (64, 8_192)
BLOCK_BYTES, COPIED_BLOCKS, COPY_LAUNCHES = 2_162_688, 64, 4
CHECKED_ROWS = 2
"""Rows of each case that are compared with the float64 reference."""

Record = dict[str, Any]


def time_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of one call, by events, after a warm-up."""
    for _ in range(3):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in marks)


def graph_ms(launches: list[Callable[[], Any]]) -> float:
    """Median time of one launch among those of one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return time_ms(graph.replay) / len(launches)


def copy_bandwidth() -> float:
    """Bytes per second of a 4 GiB device-to-device copy, read plus written."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (time_ms(lambda: target.copy_(source)) * 1e-3)


class Benchmark:
    """Runs cases and keeps their records."""

    def __init__(self, seed: int) -> None:
        self.backend = TritonBackend()
        self.generator = torch.Generator().manual_seed(seed)
        self.copy_bytes_per_s = copy_bandwidth()
        self.records: list[Record] = []

    def draw(self, *shape: int) -> torch.Tensor:
        return normal(self.generator, shape, torch.device("cuda", torch.cuda.current_device()), "bfloat16")

    def add(self, operation: str, case: str, milliseconds: float, num_bytes: int, error: float, **more: Any) -> None:
        rate = num_bytes / (milliseconds * 1e-3)
        self.records.append(
            {
                "operation": operation,
                "case": case,
                "us": milliseconds * 1e3,
                "bytes": num_bytes,
                "gb_per_s": rate / 1e9,
                "fraction_of_copy": rate / self.copy_bytes_per_s,
                "rel_error": error,
                **more,
            }
        )
        print(
            f"{operation:18} {case:42} {milliseconds * 1e3:10.1f} us {rate / 1e9:8.0f} GB/s "
            f"{rate / self.copy_bytes_per_s:6.1%}  rel_error {error:.1e}",
            flush=True,
        )
        torch.cuda.empty_cache()

    def gdn_decode(self, rows: int, state_dtype: str) -> None:
        positions = [100 + row for row in range(rows)]
        case = state_case(
            self.generator, positions=positions, layers=GDN_LAUNCHES, state_dtype=state_dtype, device="cuda"
        )
        checked = slice(0, CHECKED_ROWS)
        part = (case.layout, 0, case.x_BC[checked], case.conv_weight_CW, case.a_BV[checked], case.b_BV[checked])
        part = (*part, case.a_log_V, case.dt_bias_V, case.state_table_BL[checked], case.position_B[checked])
        expected = naive_gdn.gdn_decode(case.buffer.clone(), *part)
        error = rel_error(self.backend.gdn_decode(case.buffer, *case.step(0))[checked], expected)

        channels, (v_heads, key_dim, value_dim) = case.layout.conv_channels, case.layout.recurrent_shape
        state = v_heads * key_dim * value_dim * itemsize(state_dtype)
        ring = channels * case.layout.conv_kernel * 2  # W - 1 columns read and one written
        activations = 2 * (channels + 2 * v_heads + v_heads * value_dim)
        num_bytes = rows * (2 * state + ring + activations) + case.conv_weight_CW.numel() * 2
        launches = [lambda i=i: self.backend.gdn_decode(case.buffer, *case.step(i)) for i in range(GDN_LAUNCHES)]
        self.add("gdn_decode", f"B={rows} state={state_dtype}", graph_ms(launches), num_bytes, error, rows=rows)

    def attention(self, lengths: list[int], order: str, kb: int, blocks: int) -> AttentionCase:
        return attention_case(
            self.generator,
            lengths=lengths,
            order=order,
            layers=ATTENTION_LAYERS,
            kernel_block_tokens=kb,
            kernel_blocks=blocks,
            kv_heads=KV_HEADS,
            k_dim=DIM,
            v_dim=DIM,
            device="cuda",
            extra_entries=0,
            fill=range(ATTENTION_LAYERS),
        )

    def paged_decode(self, rows: int, length: int, order: str, kb: int, blocks: int) -> None:
        case, q_BHD, scale = self.attention([length] * rows, order, kb, blocks), self.draw(rows, HEADS, DIM), DIM**-0.5
        tables = (case.kv_table_BN, case.context_len_B)
        checked = slice(0, CHECKED_ROWS)
        part = (q_BHD[checked], *(table[checked] for table in tables))
        expected = naive_decode.paged_decode(case.buffer, case.layout, 0, *part, scale)
        out = self.backend.paged_decode(case.buffer, case.layout, 0, q_BHD, *tables, scale)
        error = rel_error(out[checked], expected)
        launches = [
            lambda i=i: self.backend.paged_decode(case.buffer, case.layout, i, q_BHD, *tables, scale)
            for i in range(ATTENTION_LAYERS)
        ]
        num_bytes = rows * length * KV_HEADS * 2 * DIM * 2 + 2 * rows * HEADS * DIM * 2
        name = f"{rows}x{length} {order} kb={kb} Tm={kb * blocks}"
        self.add("paged_decode", name, graph_ms(launches), num_bytes, error, rows=rows, length=length, order=order)

    def kv_store(self, tokens: int) -> None:
        """Decode-like: every token is a row of its own, where ``tokens`` is small; else one long prompt."""
        lengths = [100] * tokens if tokens <= 256 else [tokens]
        case = self.attention(lengths, *DECODE_LAYOUTS[0])
        device = case.buffer.device
        if len(lengths) > 1:
            row_T = torch.arange(tokens, dtype=torch.int32, device=device)
            position_T = torch.full((tokens,), 99, device=device)
        else:
            row_T = torch.zeros(tokens, dtype=torch.int32, device=device)
            position_T = torch.arange(tokens, device=device)
        k_TKD, v_TKD = self.draw(tokens, KV_HEADS, DIM), self.draw(tokens, KV_HEADS, DIM)
        inputs = (k_TKD, v_TKD, case.kv_table_BN, row_T, position_T)
        expected = case.buffer.clone()
        naive_store.kv_store(expected, case.layout, 0, *inputs)
        self.backend.kv_store(case.buffer, case.layout, 0, *inputs)
        error = 0.0 if torch.equal(case.buffer, expected) else float("inf")
        launches = [
            lambda i=i: self.backend.kv_store(case.buffer, case.layout, i, *inputs) for i in range(ATTENTION_LAYERS)
        ]
        num_bytes = 2 * (k_TKD.numel() + v_TKD.numel()) * 2
        self.add("kv_store", f"T={tokens}", graph_ms(launches), num_bytes, error, tokens=tokens)

    def qk_norm_rope_store(self, tokens: int) -> None:
        """As ``kv_store``, with the query heads and the norms; q, k and v are slices of one projection."""
        lengths = [100] * tokens if tokens <= 256 else [tokens]
        case = self.attention(lengths, *DECODE_LAYOUTS[0])
        device, count = case.buffer.device, len(lengths)
        row_T = torch.arange(count, dtype=torch.int32, device=device).repeat(tokens // count)
        position_T = torch.full((tokens,), 99, device=device) if count > 1 else torch.arange(tokens, device=device)
        sizes = [2 * HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        angle_TP = torch.rand(tokens, DIM // 8, device=device) * 6.3
        weights = (self.draw(DIM).float() * 0.1, self.draw(DIM).float() * 0.1, 1e-6, angle_TP.cos(), angle_TP.sin())
        tables = (case.kv_table_BN, row_T, position_T)

        def inputs() -> tuple[torch.Tensor, ...]:
            q, k, v = self.draw(tokens, sum(sizes)).split(sizes, dim=1)
            heads = (q.unflatten(1, (HEADS, 2 * DIM))[:, :, :DIM], k.unflatten(1, (KV_HEADS, DIM)))
            return (*heads, v.unflatten(1, (KV_HEADS, DIM)))

        of_layer = [inputs() for _ in range(ATTENTION_LAYERS)]
        expected = naive_fused.qk_norm_rope_store(case.buffer.clone(), case.layout, 0, *of_layer[0], *weights, *tables)
        out = qk_norm_rope_store(case.buffer, case.layout, 0, *of_layer[0], *weights, *tables)
        launches = [
            lambda i=i: qk_norm_rope_store(case.buffer, case.layout, i, *of_layer[i], *weights, *tables)
            for i in range(ATTENTION_LAYERS)
        ]
        num_bytes = 2 * (HEADS + 2 * KV_HEADS) * DIM * 2 * tokens + angle_TP.numel() * 8
        error = rel_error(out, expected)
        self.add("qk_norm_rope_store", f"T={tokens}", graph_ms(launches), num_bytes, error, tokens=tokens)

    def block_copy(self) -> None:
        """Scattered manager blocks: with the moves on the device already, in a graph; and as one eager call, which checks,
        cuts and uploads them while the device waits."""
        blocks = 1_024
        buffer = self.draw(blocks * BLOCK_BYTES // 2).view(torch.uint8)
        order = torch.randperm(blocks, generator=self.generator).tolist()
        pairs = zip(order[:COPIED_BLOCKS], order[COPIED_BLOCKS : 2 * COPIED_BLOCKS])
        moves = [(src * BLOCK_BYTES, dst * BLOCK_BYTES, BLOCK_BYTES) for src, dst in pairs]
        expected = buffer.clone()
        naive_copy.block_copy(expected, moves)
        self.backend.block_copy(buffer, moves)
        error = 0.0 if torch.equal(buffer, expected) else float("inf")
        num_bytes, name = 2 * COPIED_BLOCKS * BLOCK_BYTES, f"{COPIED_BLOCKS} blocks of {BLOCK_BYTES} B"
        planned = triton_copy.plan(buffer, moves)
        milliseconds = graph_ms([lambda: triton_copy.run(buffer, buffer, planned)] * COPY_LAUNCHES)
        self.add("block_copy", f"{name}, planned", milliseconds, num_bytes, error)
        self.add("block_copy", name, time_ms(lambda: self.backend.block_copy(buffer, moves)), num_bytes, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", default="", help="run only the operations whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark times CUDA kernels")

    started = time.perf_counter()
    bench = Benchmark(arguments.seed)
    print(f"copy: {bench.copy_bytes_per_s / 1e9:.0f} GB/s")
    if arguments.only in "gdn_decode":
        for state_dtype in ("float32", "bfloat16"):
            for rows in GDN_ROWS:
                bench.gdn_decode(rows, state_dtype)
    if arguments.only in "paged_decode":
        for layout in DECODE_LAYOUTS:
            for rows, length in DECODE_SHAPES:
                bench.paged_decode(rows, length, *layout)
    if arguments.only in "kv_store":
        for tokens in STORE_TOKENS:
            bench.kv_store(tokens)
    if arguments.only in "qk_norm_rope_store":
        for tokens in STORE_TOKENS:
            bench.qk_norm_rope_store(tokens)
    if arguments.only in "block_copy":
        bench.block_copy()

    result = {
        "environment": environment(),
        "copy_gb_per_s": bench.copy_bytes_per_s / 1e9,
        "seconds": time.perf_counter() - started,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "records": bench.records}, indent=1) + "\n")
    print(f"{len(bench.records)} records in {result['seconds']:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
