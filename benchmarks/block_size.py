"""Block size: attention kernels of both kinds over the size of a kernel block: what they need, and how long they take.

``page_tiled`` is the kernel whose tile of keys is the page, ``independent`` the library's own, whose tile is not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from hybridcache.memory.layout import AttentionLayout

KINDS = ("page_tiled", "independent")
OPERATIONS = ("paged_decode", "paged_prefill")
DIMS = QWEN3_NEXT_80B
DTYPE = torch.bfloat16
OUT_OF_MEMORY = ("OutOfResources", "out of resource")
"""How Triton says that a program needs more than the device has."""


def page_layout(kernel_block: int) -> AttentionLayout:
    """Layer-major pages of one kernel block."""
    case = attention_case(
        torch.Generator(),
        lengths=[0],
        order="layer_major",
        layers=1,
        kernel_block_tokens=kernel_block,
        kernel_blocks=1,
        kv_heads=DIMS.kv_heads,
        k_dim=DIMS.head_dim,
        v_dim=DIMS.head_dim,
    )
    return case.layout


def tile_bytes(kernel_block: int) -> int:
    """Shared memory that a page-tiled kernel needs at least: one tile of K and one of V, in which a page is rounded up to a
    power of two."""
    tokens = 1 << (kernel_block - 1).bit_length()
    return 2 * max(tokens, 16) * DIMS.head_dim * DTYPE.itemsize


def resources(kind: str, operation: str, kernel_block: int) -> Resources:
    """Compile one kernel for sm_90.

    Raises:
        ImportError: Triton is not installed.
    """
    kernel, constants, options = _compiled(kind, operation, page_layout(kernel_block))
    int32 = ("table_ptr", "length_ptr", "cu_ptr")
    partial_results = "float32" if operation == "paged_decode" else DTYPE
    types = {
        **{name: pointer(DTYPE) for name in ("pool_ptr", "q_ptr")},
        **dict.fromkeys(int32, "*i32"),
        **{name: pointer(partial_results) for name in ("out_ptr", "lse_ptr")},
        **dict.fromkeys(("splits", "rows", "tokens"), "i32"),
        "scale_log2": "fp32",
    }
    return measure_resources(kernel, types, constants, options)


def _compiled(kind: str, operation: str, layout: AttentionLayout) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
    """The kernel, its constants and its options, as its launcher would choose them for a long context."""
    if kind == "page_tiled":
        from benchmarks import page_tiled

        if operation == "paged_decode":
            constants = page_tiled.decode_constants(layout, DIMS.heads, DTYPE, split=True)
            return page_tiled.page_decode_kernel, constants, {"num_warps": page_tiled.DECODE.num_warps}
        constants = page_tiled.prefill_constants(layout, DIMS.heads, DTYPE)
        return page_tiled.page_prefill_kernel, constants, {"num_warps": page_tiled.PREFILL.num_warps}
    if operation == "paged_decode":
        from hybridcache.kernels.paged_decode import triton as decode
        from hybridcache.kernels.paged_decode.tiles import wide

        tiles = wide(layout, DIMS.heads, DTYPE)
        constants = decode.constants(layout, DIMS.heads, DTYPE, tiles, split=True)
        return decode.paged_decode_kernel, constants, {"num_warps": tiles.num_warps}
    from hybridcache.kernels.paged_prefill import triton as prefill
    from hybridcache.kernels.paged_prefill.tiles import choose_tiles

    tile = choose_tiles(layout, DIMS.heads, DTYPE, 8192)
    constants = prefill.constants(layout, DIMS.heads, DTYPE, tile)
    return prefill.paged_prefill_kernel, constants, {"num_warps": tile.num_warps}


# -- time --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Both kinds at one operation, shape and kernel block, on CUDA. Plain data, for another process."""

    operation: str
    rows: int
    tokens: int
    kernel_block: int
    page_tiled: bool
    """Whether the page-tiled kernel is launched; where not, it would take minutes to compile."""

    @property
    def case(self) -> Case:
        lengths = (self.tokens,) * self.rows
        at = ("bfloat16", self.kernel_block, 1, "layer_major")
        return Case(self.operation, lengths, DIMS, *at, with_torch=False)


def timed_rows(bench: Bench, timed: Timed) -> Iterator[Row]:
    """Rows of both kinds (and of Gluon and FlashAttention-3 where they are)."""
    for row in bench.rows(timed.case, _builder(timed)):
        yield {**row, "impl": "independent" if row["impl"] == "triton" else row["impl"]}


def launch_once(timed: Timed) -> None:
    """Compile what is timed by launching every implementation once, in a process of its own."""
    compile_case(timed.case, _builder(timed))


def _builder(timed: Timed) -> Callable[[Case, Setup], Work]:
    decode, prefill = _page_tiled()
    build = attention.decode if timed.operation == "paged_decode" else attention.prefill
    operation = decode if timed.operation == "paged_decode" else prefill
    return partial(build, more={"page_tiled": operation} if timed.page_tiled else {})


def _page_tiled() -> tuple[attention.Operation, attention.Operation]:
    """Page-tiled decode, whose splits give a multiprocessor four programs, and prefill."""
    from benchmarks import page_tiled
    from hybridcache.kernels.paged_decode.tiles import Tiles, choose_splits

    def decode(cache: AttentionCache, q_BHD: torch.Tensor, kv_table_BN: torch.Tensor, *rest: Any) -> torch.Tensor:
        layout, launch = cache.layout, page_tiled.DECODE
        processors = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count
        tiles = Tiles(layout.kernel_block_tokens, launch.num_warps, launch.num_stages, programs_per_sm=4)
        tokens = kv_table_BN.shape[1] * layout.tokens_per_entry
        splits = choose_splits(q_BHD.shape[0] * layout.num_kv_heads, tokens, processors, tiles)
        return page_tiled.paged_decode(cache, q_BHD, kv_table_BN, *rest, num_splits=splits)

    return decode, page_tiled.paged_prefill
