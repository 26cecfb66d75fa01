"""Precompile: kernels compiled by several processes at once, before a benchmark times them one after another.

Triton keeps what it compiles on disk by source, constants and argument types, so a process that launches a kernel on small
inputs of the same kinds spares all others the wait.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from hybridcache.bench.case import Case
from hybridcache.kernels.testing import AttentionCase, attention_case, normal

if TYPE_CHECKING:
    from hybridcache.kernels.paged_decode.tiles import Tuning

Item = TypeVar("Item")
Found = TypeVar("Found")


def each_in_parallel(
    function: Callable[[Item], Found], items: Sequence[Item], workers: int | None = None
) -> Iterator[Found | Exception]:
    """``function(item)`` for every item, in new processes: what it returns or raises, in the items' order.

    Args:
        function: a module's function, or a ``partial`` of one.
        workers: processes; most of the machine's cores where None.
    """
    workers = min(workers or max((os.cpu_count() or 1) - 2, 1), len(items))
    if not items:
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(function, item) for item in items]:
            try:
                yield future.result()
            except Exception as error:  # of one item, which must not hide the others
                yield error


def in_parallel(launch: Callable[[Item], None], items: Sequence[Item], workers: int | None = None) -> list[str]:
    """``launch(item)`` for every item, in new processes. Returns what failed, one line each: a kernel that does not build
    fails again where it is measured, and is reported there.

    Args:
        launch: compiles, best by launching on small inputs.
        workers: as of :func:`each_in_parallel`.
    """
    return [
        f"{item}: {type(error).__name__}: {' '.join(str(error).split())}"[:400]
        for item, error in zip(items, each_in_parallel(launch, items, workers))
        if isinstance(error, Exception)
    ]


def _decode_case(case: Case, device: str, lengths: Sequence[int], layers: int) -> AttentionCase:
    assert case.kernel_block
    assert case.layout
    return attention_case(
        torch.Generator(),
        lengths=lengths,
        order=case.layout,
        layers=layers,
        kernel_block_tokens=case.kernel_block,
        kernel_blocks=case.kernel_blocks,
        kv_heads=case.dims.kv_heads,
        k_dim=case.dims.head_dim,
        v_dim=case.dims.head_dim,
        dtype=case.dtype,
        device=device,
        fill=(),
    )


@dataclass(frozen=True)
class DecodeLaunch:
    """A paged decode as it is compiled: a case's layout and sizes, a tuning and the splits."""

    case: Case
    tuning: "Tuning"
    splits: int

    @classmethod
    def of(cls, case: Case, multiprocessors: int, tuning: "Tuning | None" = None) -> "DecodeLaunch":
        """What the library launches for a case of rows of one length; its own tuning where None. Cases that compile to the
        same give equal launches."""
        from hybridcache.kernels.paged_decode.tiles import choose_splits, choose_tuning

        dims, dtype = case.dims, getattr(torch, case.dtype)
        assert case.manager_block
        programs, tokens = len(case.lengths) * dims.kv_heads, -(-max(case.lengths) // case.manager_block)
        layout = _decode_case(case, "cpu", (0,), layers=1).layout
        tuning = tuning or choose_tuning(layout, dims.heads, dtype, programs, multiprocessors)
        splits = choose_splits(programs, tokens * case.manager_block, multiprocessors, tuning)
        return cls(Case(**{**vars(case), "lengths": (300, 70)}), tuning, splits)


def decode_launches(cases: Iterable[Case], multiprocessors: int) -> list[DecodeLaunch]:
    """What the paged decodes among the cases compile, once each."""
    chosen = (case for case in cases if case.operation == "paged_decode")
    return list(dict.fromkeys(DecodeLaunch.of(case, multiprocessors) for case in chosen))


def launch_decode(item: DecodeLaunch) -> None:
    """Compile a paged decode by launching it on two short rows."""
    from hybridcache.kernels.paged_decode.triton import paged_decode

    dims = item.case.dims
    at = _decode_case(item.case, "cuda", item.case.lengths, dims.attention_layers)
    q_BHD = normal(torch.Generator(), (2, dims.heads, dims.head_dim), at.buffer.device, item.case.dtype)
    inputs = (at.layout, 0, q_BHD, at.kv_table_BN, at.context_len_B, dims.head_dim**-0.5)
    paged_decode(at.buffer, *inputs, num_splits=item.splits, tuning=item.tuning)
    torch.cuda.synchronize()
