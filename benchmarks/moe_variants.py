"""Experts at the widths of Qwen3-Next (512 experts, top-10, 2048 -> 2 x 512 -> 2048, bf16): how each way of running them fares.

    python benchmarks/moe_variants.py [--out moe.json] [--tokens 1 8 16]

Ways: PyTorch's grouped products with PyTorch between them (``torch``), with Triton between them (``grouped``), the launches
for few tokens (``row by row``) and those in tiles (``tiles``) under several tilings. A CUDA graph holds ten calls with a
routing of their own each, so that experts come from memory and not from the L2 cache. ``floor`` is what it takes to read the
matrices of the distinct experts once, at the bandwidth of a large copy measured here. Every way is checked against float64
first.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hybridcache.kernels.moe import few_tokens, grouped, naive, router_rows, routing, tiled, tilings
from hybridcache.kernels.testing import rel_error
from hybridcache.observe.environment import device_name

EXPERTS, TOP_K, HIDDEN, INNER = 512, 10, 2048, 512
CANDIDATES = {
    "few": tilings.FEW,
    "few narrow": tilings.Tiling(16, True, tilings.Product(64, 128, 4, 4), tilings.Product(64, 128, 4, 4)),
    "few wide": tilings.Tiling(16, True, tilings.Product(128, 128, 3, 8), tilings.Product(128, 128, 4, 8)),
    "few unswapped": tilings.Tiling(16, False, tilings.Product(64, 128, 3, 4), tilings.Product(128, 128, 3, 4)),
    "few 32": tilings.Tiling(32, True, tilings.Product(64, 128, 3, 4), tilings.Product(128, 128, 3, 4)),
    "some": tilings.SOME,
    "some swapped": tilings.Tiling(64, True, tilings.Product(64, 64, 4, 4), tilings.Product(128, 64, 4, 4)),
    "some wide": tilings.Tiling(64, False, tilings.Product(128, 64, 4, 8), tilings.Product(128, 64, 4, 4)),
    "many": tilings.MANY,
    "many wide": tilings.Tiling(128, False, tilings.Product(128, 64, 4, 8), tilings.Product(256, 64, 3, 8)),
    "many deep": tilings.Tiling(128, False, tilings.Product(128, 64, 3, 8), tilings.Product(128, 64, 4, 8)),
    "many narrow": tilings.Tiling(128, False, tilings.Product(64, 64, 4, 8), tilings.Product(64, 64, 4, 4)),
    "many 256": tilings.Tiling(256, False, tilings.Product(64, 64, 4, 8), tilings.Product(128, 64, 4, 8)),
}
"""Cuts to be timed; all compile for Hopper without spills."""
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 8192)
MOST_FEW = 32
TOKENS_OF_TILES = {"few": (1, 1024), "some": (64, 4096), "many": (1024, 1 << 20)}
"""For which numbers of tokens tilings are timed, by the first word of their names."""
CHECKED = (6, 300, 2500)
CALLS = 10
TUNINGS = [
    few_tokens.Tuning(),
    few_tokens.Tuning(gate_rows=8, gate_dims=512, gate_warps=4, down_rows=8, down_warps=4),
    few_tokens.Tuning(gate_rows=4, gate_dims=1024, gate_warps=4, down_rows=4, down_warps=4),
    few_tokens.Tuning(gate_rows=8, gate_dims=256, gate_warps=2, down_rows=8, down_warps=2),
    few_tokens.Tuning(gate_rows=16, gate_dims=256, gate_warps=4, down_rows=16, down_warps=4),
    few_tokens.Tuning(gate_rows=16, gate_dims=512, gate_warps=8, down_rows=16, down_warps=8),
]


def with_torch_between(x, weight, expert, gate_up, down, shared_gate_up, shared_down):
    """Grouped products with PyTorch's operations between them."""
    tokens, k = expert.shape
    expert_A, order_A = expert.flatten().to(torch.int16).sort(stable=True)
    every = torch.arange(gate_up.shape[0], dtype=torch.int16, device=x.device)
    ends = torch.searchsorted(expert_A, every, right=True).int()
    narrow = naive.silu_mul(F.grouped_mm(x[order_A // k], gate_up.mT, offs=ends))
    narrow = narrow * weight[:, :k].flatten()[order_A].unsqueeze(1).to(x.dtype)
    y = F.grouped_mm(narrow, down.mT, offs=ends)
    place = torch.empty_like(order_A)
    place[order_A] = torch.arange(tokens * k, device=x.device)
    shared = F.linear(naive.silu_mul(F.linear(x, shared_gate_up)), shared_down)
    return y[place].unflatten(0, (tokens, k)).sum(1) + weight[:, k:].to(x.dtype) * shared


def median_us(run: Callable[[], None], calls: int, repeats: int = 9) -> float:
    """Median device time of one of the calls in a graph, in microseconds."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_us(lambda: target.copy_(source), 1) * 1e-6)


def ways(tokens: int) -> dict[str, Callable]:
    found: dict[str, Callable] = {"torch": with_torch_between, "grouped": grouped.mixture}
    if tokens <= MOST_FEW:
        for tuning in TUNINGS:
            name = f"row by row {tuning.gate_rows}x{tuning.gate_dims}w{tuning.gate_warps} "
            name += f"{tuning.down_rows}w{tuning.down_warps}"
            found[name] = lambda *args, tuning=tuning: few_tokens.mixture(*args, tuning=tuning)
    for name, tiling in CANDIDATES.items():
        fewest, most = TOKENS_OF_TILES[name.split()[0]]
        if fewest <= tokens <= most:
            found[f"tiles {name}"] = lambda *args, tiling=tiling: tiled.mixture(*args, tiling=tiling)
    return found


def make_case(tokens: int) -> tuple[torch.Tensor, ...]:
    """A routing of random tokens: x, weights, experts."""
    logits = torch.randn(tokens, router_rows(EXPERTS), device="cuda").bfloat16()
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    return x, *routing.route(logits, EXPERTS, TOP_K, True)


def check(matrices: list[torch.Tensor]) -> dict[str, float]:
    """Largest error of every way, for numbers of tokens that together try them all, against float64. Twice the same input
    must give the same output, to the bit."""
    exact_matrices = [matrix.double() for matrix in matrices]
    errors: dict[str, float] = {}
    for tokens in CHECKED:
        x, weight, expert = make_case(tokens)
        exact = naive.mixture(x.double(), weight.double(), expert, *exact_matrices)
        for name, way in ways(tokens).items():
            out = way(x, weight, expert, *matrices)
            assert torch.equal(out, way(x, weight, expert, *matrices)), name
            errors[name] = max(errors.get(name, 0.0), rel_error(out, exact))
    assert all(error < 2e-2 for error in errors.values()), errors
    return errors


def measure(tokens: int, matrices: list[torch.Tensor], bandwidth: float) -> list[dict]:
    """Times of all ways, and of routing, for that many tokens."""
    calls = CALLS if tokens <= 1024 else 2
    cases = [make_case(tokens) for _ in range(calls)]
    distinct = sum(case[2].unique().numel() for case in cases) / calls
    floor = ((distinct + 1) * 3 * HIDDEN * INNER * 2 + 2 * tokens * HIDDEN * 2) / bandwidth * 1e6
    rows = []
    for name, way in ways(tokens).items():
        us = median_us(lambda way=way: [way(*case, *matrices) for case in cases], calls)
        rows.append({"tokens": tokens, "way": name, "us": round(us, 2), "floor_us": round(floor, 2)})
    logits = torch.randn(tokens, router_rows(EXPERTS), device="cuda").bfloat16()
    for name, route in (("route torch", naive.route), ("route triton", routing.route)):
        us = median_us(lambda route=route: [route(logits, EXPERTS, TOP_K, True) for _ in range(calls)], calls)
        rows.append({"tokens": tokens, "way": name, "us": round(us, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device")
    torch.manual_seed(int(time.time()))
    started = time.perf_counter()
    shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER), (2 * INNER, HIDDEN), (HIDDEN, INNER))
    matrices = [torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02) for shape in shapes]
    bandwidth = copy_bandwidth()
    record = {"device": device_name(), "torch": torch.__version__, "copy_bytes_per_s": bandwidth}
    record |= {"errors": check(matrices), "rows": []}
    for tokens in args.tokens:
        record["rows"] += measure(tokens, matrices, bandwidth)
        print(f"[{time.perf_counter() - started:5.1f} s] {tokens} tokens", flush=True)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(f"{row['tokens']:6} {row['way']:30} {row['us']:9.1f} us  floor {row.get('floor_us', 0):8.1f}")


if __name__ == "__main__":
    main()
