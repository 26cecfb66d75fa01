"""Block size: attention kernels of both kinds over the size of a kernel block: what they need, and how long they take.

``page_tiled`` is the kernel whose tile of keys is the page, ``independent`` the library's own, whose tile is not.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import attention
from benchmarks.case import QWEN3_NEXT_80B, Case
from benchmarks.measure import Bench, Row, compile_case
from benchmarks.resources import Resources, measure_resources, pointer
from benchmarks.work import Setup, Work
from hybridcache.kernels.caches import AttentionCache
from hybridcache.kernels.testing import attention_case

KINDS = ("page_tiled", "independent")
OPERATIONS = {"paged_decode": attention.decode, "paged_prefill": attention.prefill}
DIMS = QWEN3_NEXT_80B
DTYPE = torch.bfloat16
OUT_OF_MEMORY = ("OutOfResources", "out of resource")
"""How Triton says that a program needs more than the device has."""


def tile_bytes(kernel_block: int) -> int:
    """Shared memory that a page-tiled kernel needs at least: one tile of K and one of V, in which a page is rounded up to a
    power of two."""
    tokens = 1 << (kernel_block - 1).bit_length()
    return 2 * max(tokens, 16) * DIMS.head_dim * DTYPE.itemsize


def resources(kind: str, operation: str, kernel_block: int) -> Resources:
    """Compile one kernel for sm_90, its constants as its launcher would choose them for a long context.

    Raises:
        ImportError: Triton is not installed.
    """
    from benchmarks import page_tiled
    from hybridcache.kernels.paged_decode import tiles as decode_tiles
    from hybridcache.kernels.paged_decode import triton as decode
    from hybridcache.kernels.paged_prefill import tiles as prefill_tiles
    from hybridcache.kernels.paged_prefill import triton as prefill

    sizes: dict[str, Any] = {"kv_heads": DIMS.kv_heads, "k_dim": DIMS.head_dim, "v_dim": DIMS.head_dim, "layers": 1}
    page: dict[str, Any] = {"order": "layer_major", "kernel_block_tokens": kernel_block, "kernel_blocks": 1}
    layout, decodes = (
        attention_case(torch.Generator(), lengths=[0], **sizes, **page).layout,
        operation == "paged_decode",
    )
    at = (layout, DIMS.heads, DTYPE)
    kernel: Any
    if kind == "page_tiled":
        kernel, constants = page_tiled.page_tiled_kernel, page_tiled.constants(operation, *at, split=decodes)
        warps = page_tiled.WARPS[operation]
    elif decodes:
        tile = decode_tiles.wide(*at)
        kernel, constants = decode.paged_decode_kernel, decode.constants(*at, tile, split=True)
        warps = tile.num_warps
    else:
        cut = prefill_tiles.choose_tiles(*at, 8192)
        kernel, constants = prefill.paged_prefill_kernel, prefill.constants(*at, cut)
        warps = cut.num_warps
    types = {
        **dict.fromkeys(("pool_ptr", "q_ptr"), pointer(DTYPE)),
        **dict.fromkeys(("table_ptr", "length_ptr", "cu_ptr"), "*i32"),
        **dict.fromkeys(("out_ptr", "lse_ptr"), pointer("float32" if decodes else DTYPE)),
        **dict.fromkeys(("splits", "rows", "tokens"), "i32"),
        "scale_log2": "fp32",
    }
    return measure_resources(kernel, types, constants, {"num_warps": warps})


# -- time --------------------------------------------------------------------------------------------------------------


def timed_case(operation: str, rows: int, tokens: int, kernel_block: int) -> Case:
    """Rows of one length in layer-major pages of one kernel block."""
    return Case(operation, (tokens,) * rows, DIMS, "bfloat16", kernel_block, 1, "layer_major", with_torch=False)


def _builder(page_tiled_up_to: int, case: Case) -> Callable[[Case, Setup], Work]:
    """Both kinds; page-tiled kernels of larger blocks would take minutes to compile."""
    from benchmarks import page_tiled

    operation = _split_decode if case.operation == "paged_decode" else page_tiled.paged_prefill
    more = {"page_tiled": operation} if (case.kernel_block or 0) <= page_tiled_up_to else {}
    return partial(OPERATIONS[case.operation], more=more)


def timed_rows(bench: Bench, page_tiled_up_to: int, case: Case) -> Iterator[Row]:
    """Rows of both kinds (and of Gluon and FlashAttention-3 where they are)."""
    for row in bench.rows(case, _builder(page_tiled_up_to, case)):
        yield {**row, "impl": "independent" if row["impl"] == "triton" else row["impl"]}


def compile_timed(page_tiled_up_to: int, case: Case) -> None:
    """Compile what is timed by launching every implementation once, in a process of its own."""
    compile_case(case, _builder(page_tiled_up_to, case))


def _split_decode(cache: AttentionCache, q_BHD: torch.Tensor, kv_table_BN: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Page-tiled decode whose splits give a multiprocessor four programs."""
    from benchmarks import page_tiled
    from hybridcache.kernels.paged_decode.tiles import Tiles, choose_splits

    layout, stages = cache.layout, page_tiled.STAGES["paged_decode"]
    processors = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count
    tiles = Tiles(layout.kernel_block_tokens, page_tiled.WARPS["paged_decode"], stages, programs_per_sm=4)
    tokens = kv_table_BN.shape[1] * layout.tokens_per_entry
    splits = choose_splits(q_BHD.shape[0] * layout.num_kv_heads, tokens, processors, tiles)
    return page_tiled.paged_decode(cache, q_BHD, kv_table_BN, *rest, num_splits=splits)
