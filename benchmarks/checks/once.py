"""Every kernel once, on small shapes with padding rows, partial tiles and stale positions: for tools that watch launches."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcache.kernels.testing import AttentionCase, attention_case, normal, state_case

PLANTED = "planted"
HEADS, KV_HEADS, DIM, PAIRS = 16, 2, 256, 32


def gdn_decode(state_dtype: str, shared_memory: bool, generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.gdn_decode.triton import gdn_decode
    from hybridcache.kernels.gdn_decode.tuning import default_tuning

    case = state_case(generator, positions=[0, 2, -1, 77], state_dtype=state_dtype, device="cuda")
    tuning = default_tuning(256 if shared_memory else 4, getattr(torch, state_dtype))
    step: list[Any] = [*case.step(1), tuning]
    return [gdn_decode(case.buffer, *step)]


def gdn_prefill(dtype: str, generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
    from hybridcache.kernels.gdn_prefill.triton import gdn_prefill

    sizes: dict[str, Any] = {"lengths": [130, 3, 9, 70], "starts": [0, 62, -1, 64], "tail": 5, "layers": 1}
    pool: dict[str, Any] = {"dtype": dtype, "conv_dtype": dtype, "device": "cuda", "pool_bytes": 20 << 21}
    case = prefill_case(generator, **sizes, **pool)
    table_BNL = checkpoint_table(case, 0, 64)
    checkpoints: dict[str, Any] = {"checkpoint_table_BNL": table_BNL, "checkpoint_interval": 64}
    return [gdn_prefill(case.buffer, *case.step(0), **checkpoints)]


def paged_case(generator: torch.Generator, blocks: int = 11) -> AttentionCase:
    lengths = [300, 0, 70, 1000]
    return attention_case(generator, lengths=lengths, kernel_blocks=blocks, device="cuda", fill=(1,))


def paged_decode(splits: int, large_tiles: bool, generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.paged_decode.tiles import narrow, wide
    from hybridcache.kernels.paged_decode.triton import paged_decode

    case = paged_case(generator)
    q_BHD = normal(generator, (4, HEADS, DIM), case.buffer.device, "bfloat16")
    tuning = (wide if large_tiles else narrow)(case.layout, HEADS, torch.bfloat16)
    rest = (case.kv_table_BN, case.context_len_B, DIM**-0.5)
    return [paged_decode(case.buffer, case.layout, 1, q_BHD, *rest, num_splits=splits, tuning=tuning)]


def page_tiled_decode(generator: torch.Generator) -> list[torch.Tensor]:
    from benchmarks.page_tiled import paged_decode

    case = paged_case(generator, blocks=1)
    q_BHD = normal(generator, (4, HEADS, DIM), case.buffer.device, "bfloat16")
    rest = (case.kv_table_BN, case.context_len_B, DIM**-0.5)
    return [paged_decode(case.buffer, case.layout, 1, q_BHD, *rest, num_splits=3)]


def prefill(name: str, generator: torch.Generator) -> list[torch.Tensor]:
    from benchmarks import page_tiled
    from hybridcache.kernels.paged_prefill import hopper
    from hybridcache.kernels.paged_prefill import triton as plain

    case = paged_case(generator, blocks=1 if name == "page_tiled" else 11)
    operation = {"triton": plain, "gluon": hopper, "page_tiled": page_tiled}[name].paged_prefill
    queries = [300, 4, 7, 130]
    q_THD = normal(generator, (sum(queries), HEADS, DIM), case.buffer.device, "bfloat16")
    offsets = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
    rest = (case.kv_table_BN, offsets, case.context_len_B, DIM**-0.5, 300, 1000)
    return [operation(case.buffer, case.layout, 1, q_THD, *rest)]


def destinations(generator: torch.Generator) -> tuple[AttentionCase, torch.Tensor, torch.Tensor]:
    """A cache, and rows and positions of some tokens; row 1 is a padding row, its position stale."""
    case = paged_case(generator)
    row_T = torch.tensor([0, 0, 1, 2, 3], dtype=torch.int32, device="cuda")
    return case, row_T, torch.tensor([0, 299, 1 << 20, 69, 999], device="cuda")


def kv_store(generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.kv_store.triton import kv_store

    case, row_T, position_T = destinations(generator)
    k_TKD, v_TKD = (normal(generator, (5, KV_HEADS, DIM), case.buffer.device, "bfloat16") for _ in range(2))
    kv_store(case.buffer, case.layout, 0, k_TKD, v_TKD, case.kv_table_BN, row_T, position_T)
    return []


def fused_store(generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.qk_norm_rope_store.triton import qk_norm_rope_store

    case, row_T, position_T = destinations(generator)
    draw = partial(normal, generator, device=case.buffer.device)
    q_THD, k_TKD, v_TKD = (draw((5, n, DIM), dtype="bfloat16") for n in (HEADS, KV_HEADS, KV_HEADS))
    weights = [draw((DIM,), dtype="float32") for _ in range(2)]
    angle_TP = draw((5, PAIRS), dtype="float32")
    norms: list[Any] = [*weights, 1e-6, angle_TP.cos(), angle_TP.sin(), case.kv_table_BN, row_T, position_T]
    return [qk_norm_rope_store(case.buffer, case.layout, 0, q_THD, k_TKD, v_TKD, *norms)]


def block_copy(generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.block_copy.triton import block_copy

    size = 4096 + 16
    buffer = normal(generator, (8 * size // 4,), torch.device("cuda"), "float32").view(torch.uint8)
    block_copy(buffer, [(0, 7 * size, size), (size, 2 * size, size), (2 * size, 0, size), (5, 3 * size + 1, 99)])
    return []


def experts(name: str, generator: torch.Generator) -> list[torch.Tensor]:
    """Routing, then the experts of few tokens, those in tiles, or what stands between the grouped products (those are
    PyTorch's)."""
    from hybridcache.kernels.moe import few_tokens, grouped, router_rows, routing, tiled, tilings

    draw = partial(normal, generator, device=torch.device("cuda"), dtype="bfloat16")
    tokens, count, k, hidden, inner = 5, 19, 3, 256, 64
    x_TD = draw((tokens, hidden))
    weight_Ts, expert_Tk = routing.route(draw((tokens, router_rows(count))), count, k, True)
    if name != "many":
        matrices = (
            draw((count, 2 * inner, hidden)),
            draw((count, hidden, inner)),
            draw((2 * inner, hidden)),
            draw((hidden, inner)),
        )
        if name == "few":
            return [few_tokens.mixture(x_TD, weight_Ts, expert_Tk, *matrices)]
        cuts = (tilings.FEW, tilings.SOME, tilings.MANY)
        return [tiled.mixture(x_TD, weight_Ts, expert_Tk, *matrices, tiling=cut) for cut in cuts]
    order_A = expert_Tk.flatten().sort(stable=True).indices
    x_AD, place_A = grouped.gather(x_TD, order_A, k)
    narrow = grouped.silu_mul(draw((tokens * k, 2 * inner)), weight_Ts, order_A)
    return [narrow, grouped.combine(x_AD, place_A, x_TD, weight_Ts)]


def norms(generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.norms.triton import add_norm, gated_norm, sigmoid_mul

    draw = partial(normal, generator, device=torch.device("cuda"))
    x_TD, delta_TD = (draw((5, 200), dtype="bfloat16") for _ in range(2))
    x_THE, gate_THE = (draw((5, 3, 128), dtype="bfloat16") for _ in range(2))
    weight_D = draw((200,), dtype="float32")
    normed_THE, gated_THE = torch.empty_like(x_THE), torch.empty_like(x_THE)
    gated_norm(x_THE, gate_THE, weight_D[:128], 1e-6, normed_THE)
    sigmoid_mul(x_THE, gate_THE, gated_THE)
    return [*add_norm(x_TD, delta_TD, weight_D, 1e-6), normed_THE, gated_THE]


def greedy(generator: torch.Generator) -> list[torch.Tensor]:
    from hybridcache.kernels.greedy.triton import greedy

    logits_RV = normal(generator, (3, 9001), torch.device("cuda"), "bfloat16")
    ids_R, feed_R = (torch.empty(3, dtype=torch.int64, device="cuda") for _ in range(2))
    greedy(logits_RV, ids_R, feed_R)
    return [logits_RV.gather(1, ids_R[:, None])]


@triton.jit
def write_beyond_kernel(ptr, size, BLOCK: tl.constexpr):
    offset = size + tl.arange(0, BLOCK)
    tl.store(ptr + offset, offset)


def planted(generator: torch.Generator) -> list[torch.Tensor]:
    """Writes behind its tensor."""
    write_beyond_kernel[(1,)](torch.zeros(64, dtype=torch.int32, device="cuda"), 64, BLOCK=64)
    return []


KERNELS: dict[str, Callable[[torch.Generator], list[torch.Tensor]]] = {
    "gdn_decode float32": partial(gdn_decode, "float32", False),
    "gdn_decode bfloat16": partial(gdn_decode, "bfloat16", False),
    "gdn_decode gluon float32": partial(gdn_decode, "float32", True),
    "gdn_decode gluon bfloat16": partial(gdn_decode, "bfloat16", True),
    "gdn_prefill bfloat16 checkpoints": partial(gdn_prefill, "bfloat16"),
    "gdn_prefill float32 checkpoints": partial(gdn_prefill, "float32"),
    "paged_decode large tiles, 7 splits": partial(paged_decode, 7, True),
    "paged_decode small tiles, 1 split": partial(paged_decode, 1, False),
    "paged_prefill triton": partial(prefill, "triton"),
    "paged_prefill gluon": partial(prefill, "gluon"),
    "kv_store": kv_store,
    "qk_norm_rope_store": fused_store,
    "block_copy": block_copy,
    "page_tiled decode": page_tiled_decode,
    "page_tiled prefill": partial(prefill, "page_tiled"),
    "routing, experts of few tokens": partial(experts, "few"),
    "routing, experts in tiles": partial(experts, "tiles"),
    "between grouped products": partial(experts, "many"),
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
