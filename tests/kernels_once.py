"""Every kernel once, on small shapes with padding rows, partial tiles and stale positions: for tools that watch launches."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import page_tiled
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.testing import AttentionCase, attention_case, cached, normal, state_case

Outs = list[torch.Tensor]

PLANTED = "planted"
HEADS, KV_HEADS, DIM, PAIRS = 16, 2, 256, 32
CUDA = torch.device("cuda")


def gdn_decode(state_dtype: str, shared_memory: bool, apart: bool, generator: torch.Generator) -> Outs:
    from hybridcache.kernels.gdn_decode.tiles import default_tiles
    from hybridcache.kernels.gdn_decode.triton import gdn_decode

    case = state_case(generator, positions=[0, 2, -1, 77], state_dtype=state_dtype, device="cuda", apart=apart)
    tiles = default_tiles(256 if shared_memory else 4, getattr(torch, state_dtype))
    step: list[Any] = [*cached(case.buffer, *case.step(1)), tiles]
    return [gdn_decode(*step)]


def gdn_prefill(dtype: str, apart: bool, generator: torch.Generator) -> Outs:
    from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
    from hybridcache.kernels.gdn_prefill.triton import gdn_prefill

    sizes: dict[str, Any] = {
        "lengths": [130, 3, 9, 70],
        "starts": [0, 62, -1, 64],
        "tail": 5,
        "layers": 1,
        "apart": apart,
    }
    pool: dict[str, Any] = {"dtype": dtype, "conv_dtype": dtype, "device": "cuda", "pool_bytes": 20 << 21}
    case = prefill_case(generator, **sizes, **pool)
    kept: dict[str, Any] = {"checkpoint_table_BNL": checkpoint_table(case, 0, 64), "checkpoint_interval": 64}
    return [gdn_prefill(*cached(case.buffer, *case.step(0)), **kept)]


def paged_case(generator: torch.Generator, blocks: int = 11) -> tuple[AttentionCase, AttentionCache]:
    case = attention_case(generator, lengths=[300, 0, 70, 1000], kernel_blocks=blocks, device="cuda", fill=(1,))
    return case, AttentionCache(case.buffer, case.layout, 1)


def decode(splits: int, kind: str, generator: torch.Generator) -> Outs:
    """Paged decode with ``narrow`` or ``wide`` tiles, or tiles that are the ``page``."""
    from hybridcache.kernels.paged_decode.tiles import narrow, wide
    from hybridcache.kernels.paged_decode.triton import paged_decode

    case, cache = paged_case(generator, blocks=1 if kind == "page" else 11)
    q_BHD = normal(generator, (4, HEADS, DIM), CUDA, "bfloat16")
    inputs = (cache, q_BHD, case.kv_table_BN, case.context_len_B, DIM**-0.5)
    if kind == "page":
        return [page_tiled.paged_decode(*inputs, num_splits=splits)]
    tiles = (wide if kind == "wide" else narrow)(case.layout, HEADS, torch.bfloat16)
    return [paged_decode(*inputs, num_splits=splits, tiles=tiles)]


def prefill(name: str, generator: torch.Generator) -> Outs:
    from hybridcache.kernels.paged_prefill import hopper
    from hybridcache.kernels.paged_prefill import triton as plain

    case, cache = paged_case(generator, blocks=1 if name == "page_tiled" else 11)
    operation = {"triton": plain, "gluon": hopper, "page_tiled": page_tiled}[name].paged_prefill  # type: ignore[attr-defined]
    queries = [300, 4, 7, 130]
    q_THD = normal(generator, (sum(queries), HEADS, DIM), CUDA, "bfloat16")
    offsets = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    return [operation(cache, q_THD, case.kv_table_BN, offsets, case.context_len_B, DIM**-0.5, 300, 1000)]


def destinations(generator: torch.Generator) -> tuple[AttentionCache, tuple[torch.Tensor, ...]]:
    """A cache, and table, rows and positions of some tokens; row 1 is a padding row, its position stale."""
    case, cache = paged_case(generator)
    row_T = torch.tensor([0, 0, 1, 2, 3], dtype=torch.int32, device="cuda")
    return cache, (case.kv_table_BN, row_T, torch.tensor([0, 299, 1 << 20, 69, 999], device="cuda"))


def kv_store(generator: torch.Generator) -> Outs:
    from hybridcache.kernels.kv_store.triton import kv_store

    cache, place = destinations(generator)
    kv_store(cache, *(normal(generator, (5, KV_HEADS, DIM), CUDA, "bfloat16") for _ in range(2)), *place)
    return []


def fused_store(generator: torch.Generator) -> Outs:
    from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store

    cache, place = destinations(generator)
    draw = partial(normal, generator, device=CUDA)
    qkv = [draw((5, n, DIM), dtype="bfloat16") for n in (HEADS, KV_HEADS, KV_HEADS)]
    weights, angle_TP = [draw((DIM,), dtype="float32") for _ in range(2)], draw((5, PAIRS), dtype="float32")
    rest: list[Any] = [*qkv, *weights, 1e-6, angle_TP.cos(), angle_TP.sin(), *place]
    return [qk_norm_rope_store(cache, *rest)]


def block_copy(generator: torch.Generator) -> Outs:
    from hybridcache.kernels.block_copy.triton import block_copy

    size = 4096 + 16
    buffer = normal(generator, (8 * size // 4,), CUDA, "float32").view(torch.uint8)
    block_copy(buffer, [(0, 7 * size, size), (size, 2 * size, size), (2 * size, 0, size), (5, 3 * size + 1, 99)])
    return []


def experts(name: str, generator: torch.Generator) -> Outs:
    """Routing, then the experts of few tokens, those in tiles, or the gating of one expert for all."""
    from hybridcache.kernels.moe import few_tokens, router_rows, routing, silu_mul, tiled, tiles

    draw = partial(normal, generator, device=CUDA, dtype="bfloat16")
    tokens, count, k, hidden, inner = 5, 19, 3, 256, 64
    x_TD = draw((tokens, hidden))
    weight_Ts, expert_Tk = routing.route(draw((tokens, router_rows(count))), count, k, True)
    if name != "shared":
        shapes = ((count, 2 * inner, hidden), (count, hidden, inner), (2 * inner, hidden), (hidden, inner))
        inputs: list[Any] = [x_TD, weight_Ts, expert_Tk, *map(draw, shapes)]
        if name == "few":
            return [few_tokens.mixture(*inputs)]
        return [tiled.mixture(*[*inputs, cut]) for cut in (tiles.FEW, tiles.SOME, tiles.MANY)]
    return [silu_mul.silu_mul(draw((tokens * k, 2 * inner)))]


def norms(generator: torch.Generator) -> Outs:
    from hybridcache.kernels.norms.triton import add_norm, gated_norm, sigmoid_mul

    draw = partial(normal, generator, device=CUDA)
    x_TD, delta_TD = (draw((5, 200), dtype="bfloat16") for _ in range(2))
    x_THE, gate_THE = (draw((5, 3, 128), dtype="bfloat16") for _ in range(2))
    weight_D = draw((200,), dtype="float32")
    normed_THE, gated_THE = torch.empty_like(x_THE), torch.empty_like(x_THE)
    gated_norm(x_THE, gate_THE, weight_D[:128], 1e-6, normed_THE)
    sigmoid_mul(x_THE, gate_THE, gated_THE)
    return [*add_norm(x_TD, delta_TD, weight_D, 1e-6), normed_THE, gated_THE]


def greedy(generator: torch.Generator) -> Outs:
    from hybridcache.kernels.greedy.triton import greedy

    logits_RV = normal(generator, (3, 9001), CUDA, "bfloat16")
    ids_R, feed_R = (torch.empty(3, dtype=torch.int64, device="cuda") for _ in range(2))
    greedy(logits_RV, ids_R, feed_R)
    return [logits_RV.gather(1, ids_R[:, None])]


@triton.jit
def write_beyond_kernel(ptr, size, BLOCK: tl.constexpr):
    offset = size + tl.arange(0, BLOCK)
    tl.store(ptr + offset, offset)


def planted(generator: torch.Generator) -> Outs:
    """Writes behind its tensor."""
    write_beyond_kernel[(1,)](torch.zeros(64, dtype=torch.int32, device="cuda"), 64, BLOCK=64)
    return []


KERNELS: dict[str, Callable[[torch.Generator], Outs]] = {
    "gdn_decode float32": partial(gdn_decode, "float32", False, False),
    "gdn_decode bfloat16": partial(gdn_decode, "bfloat16", False, False),
    "gdn_decode bfloat16 to another block": partial(gdn_decode, "bfloat16", False, True),
    "gdn_decode gluon float32": partial(gdn_decode, "float32", True, False),
    "gdn_decode gluon bfloat16": partial(gdn_decode, "bfloat16", True, False),
    "gdn_decode gluon float32 to another block": partial(gdn_decode, "float32", True, True),
    "gdn_prefill bfloat16 checkpoints": partial(gdn_prefill, "bfloat16", False),
    "gdn_prefill bfloat16 checkpoints, to another block": partial(gdn_prefill, "bfloat16", True),
    "gdn_prefill float32 checkpoints": partial(gdn_prefill, "float32", False),
    "paged_decode large tiles, 7 splits": partial(decode, 7, "wide"),
    "paged_decode small tiles, 1 split": partial(decode, 1, "narrow"),
    "paged_prefill triton": partial(prefill, "triton"),
    "paged_prefill gluon": partial(prefill, "gluon"),
    "kv_store": kv_store,
    "qk_norm_rope_store": fused_store,
    "block_copy": block_copy,
    "page_tiled decode": partial(decode, 3, "page"),
    "page_tiled prefill": partial(prefill, "page_tiled"),
    "routing, experts of few tokens": partial(experts, "few"),
    "routing, experts in tiles": partial(experts, "tiles"),
    "SiLU gating": partial(experts, "shared"),
    "norms": norms,
    "greedy": greedy,
}


def here() -> list[str]:
    """Kernels that this device can run."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return [name for name in KERNELS if hopper or "gluon" not in name]


def launch(name: str) -> None:
    """One kernel on new random inputs.

    Raises:
        ArithmeticError: it gives something that is not finite.
    """
    kernel = planted if name == PLANTED else KERNELS[name]
    outs = kernel(torch.Generator().manual_seed(time.time_ns() % (1 << 31)))
    torch.cuda.synchronize()
    if not all(bool(out.isfinite().all()) for out in outs):
        raise ArithmeticError(f"{name}: not finite")
