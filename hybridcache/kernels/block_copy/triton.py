"""Block copy in Triton: byte ranges of the pool to other ranges of it, executed as if one after the other.

Moves that do not depend on each other run in one launch: a launch is closed before a move that reads or overwrites what an
earlier move of that launch writes, or overwrites what one reads. :func:`plan` cuts and uploads a list of moves,
:func:`run` launches it, as often as one likes.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridcache.kernels.caches import elements
from hybridcache.kernels.launch import launcher
from hybridcache.kernels.sizes import ceil_div

MAX_MOVES = 65_535
"""Moves of one launch at most: the largest second dimension of a CUDA grid."""

Move = tuple[int, int, int]


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut: words (8 bytes at 16- and 8-byte units) that one program copies, and its warps."""

    chunk_words: int = 2_048
    num_warps: int = 4


DEFAULT_TILES = Tiles()
"""16 KiB in eight 16-byte vectors per thread, all on their way before the first is stored."""


@triton.jit
def block_copy_kernel(src_ptr, dst_ptr, move_ptr, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """``move_ptr`` holds ``(src, dst, length)`` in units of ``WORDS`` elements, so that the compiler sees every address to
    be a multiple of the unit and moves whole vectors."""
    move = move_ptr + 3 * tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    src = tl.load(move) * WORDS + first
    dst = tl.load(move + 1) * WORDS + first
    left = tl.load(move + 2) * WORDS - first
    if left <= 0:
        return
    word = tl.arange(0, CHUNK)
    inside = word < left
    data = tl.load(src_ptr + src + word, mask=inside, other=0)
    tl.store(dst_ptr + dst + word, data, mask=inside)


class _Ranges:
    """Byte ranges, kept sorted and merged."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def overlap(self, start: int, end: int) -> bool:
        first = bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end

    def add(self, start: int, end: int) -> None:
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]


def independent_batches(moves: Iterable[Move]) -> list[list[Move]]:
    """Cut a list of moves, in order, into lists whose moves may run in any order or at once."""
    batches: list[list[Move]] = []
    reads, writes = _Ranges(), _Ranges()
    for src, dst, num_bytes in moves:
        source, target = (src, src + num_bytes), (dst, dst + num_bytes)
        depends = writes.overlap(*source) or writes.overlap(*target) or reads.overlap(*target)
        if not batches or depends or len(batches[-1]) == MAX_MOVES:
            batches.append([])
            reads, writes = _Ranges(), _Ranges()
        batches[-1].append((src, dst, num_bytes))
        reads.add(*source)
        writes.add(*target)
    return batches


def independent(move_M3: npt.NDArray[np.int64]) -> bool:
    """Whether no move's target meets another move's source or target: then one batch holds them all. This is what lists of
    moves are nearly always; it takes microseconds where :func:`independent_batches` takes some for every move."""
    src_M, dst_M, length_M = move_M3.T
    order_M = np.argsort(dst_M)
    start_M = dst_M[order_M]
    end_M = start_M + length_M[order_M]
    if (start_M[1:] < end_M[:-1]).any():
        return False
    next_target_M = np.searchsorted(end_M, src_M, side="right")
    inside_M = next_target_M < len(move_M3)
    return not (start_M[next_target_M[inside_M]] < (src_M + length_M)[inside_M]).any()


def unit(moves: Iterable[Move]) -> int:
    """Largest of 16, 8, 4, 2, 1 bytes that divides every address and length."""
    bits = 16 | int(np.bitwise_or.reduce(np.asarray(list(moves), dtype=np.int64), axis=None))
    return bits & -bits


_ELEMENT = {16: torch.int64, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def constants(unit_bytes: int, tiles: Tiles = DEFAULT_TILES) -> dict[str, int]:
    """Compile-time parameters of :func:`block_copy_kernel`."""
    return {"WORDS": 2 if unit_bytes == 16 else 1, "CHUNK": tiles.chunk_words}


def options(tiles: Tiles = DEFAULT_TILES) -> dict[str, Any]:
    """Launch options."""
    return {"num_warps": tiles.num_warps}


@dataclass(frozen=True)
class Batch:
    """Independent moves on the device: ``move_M3`` int64 ``(src, dst, length)`` in units of ``unit_bytes``."""

    move_M3: Tensor
    unit_bytes: int
    longest: int
    """Bytes of the longest move."""


def checked(moves: Sequence[Move], src_bytes: int, dst_bytes: int) -> npt.NDArray[np.int64]:
    """The moves as an array ``[M, 3]``, empty ones dropped.

    Raises:
        ValueError: a move leaves the source of ``src_bytes`` or the destination of ``dst_bytes``.
    """
    move_M3 = np.asarray(moves, dtype=np.int64).reshape(-1, 3)
    src_M, dst_M, length_M = move_M3.T
    bad_M = (move_M3 < 0).any(axis=1) | (src_M + length_M > src_bytes) | (dst_M + length_M > dst_bytes)
    if bad_M.any():
        first = tuple(move_M3[bad_M.argmax()].tolist())
        sizes = f"{src_bytes}" if src_bytes == dst_bytes else f"{src_bytes} or {dst_bytes}"
        raise ValueError(f"move={first}: leaves the buffer of {sizes} bytes")
    return move_M3[length_M > 0]


def upload(move_M3: npt.NDArray[np.int64], device: torch.device) -> Batch:
    """One batch of independent moves on ``device``. The copy is asynchronous, in order with the device's current stream."""
    bits = 16 | int(np.bitwise_or.reduce(move_M3, axis=None))
    unit_bytes = bits & -bits
    units_M3 = torch.from_numpy(move_M3 // unit_bytes)
    if device.type == "cuda":
        units_M3 = units_M3.pin_memory().to(device, non_blocking=True)
    return Batch(units_M3, unit_bytes, int(move_M3[:, 2].max()))


def plan(buffer: Tensor, moves: Sequence[Move]) -> list[Batch]:
    """Cut moves into batches that run one after the other, on the buffer's device.

    Raises:
        ValueError: a move leaves the buffer, or its source and destination overlap.
    """
    move_M3 = checked(moves, buffer.numel(), buffer.numel())
    overlapping_M = np.abs(move_M3[:, 0] - move_M3[:, 1]) < move_M3[:, 2]
    if overlapping_M.any():
        first = tuple(move_M3[overlapping_M.argmax()].tolist())
        raise ValueError(f"move={first}: source and destination overlap")
    if len(move_M3) == 0:
        return []
    if len(move_M3) <= MAX_MOVES and independent(move_M3):
        return [upload(move_M3, buffer.device)]
    batches = independent_batches(map(tuple, move_M3.tolist()))
    return [upload(np.asarray(batch, dtype=np.int64), buffer.device) for batch in batches]


def plan_between(source: Tensor, target: Tensor, moves: Sequence[Move]) -> list[Batch]:
    """One batch of moves from one buffer to another; either may be pinned host memory, the other is on a CUDA device.

    Raises:
        ValueError: a move leaves its buffers, two of them write the same bytes, or there are more than a launch takes.
    """
    move_M3 = checked(moves, source.numel(), target.numel())
    if len(move_M3) > MAX_MOVES:
        raise ValueError(f"moves={len(move_M3)}: a launch takes at most {MAX_MOVES}; give several lists")
    by_target_M3 = move_M3[np.argsort(move_M3[:, 1])]
    if (by_target_M3[1:, 1] < by_target_M3[:-1, 1] + by_target_M3[:-1, 2]).any():
        raise ValueError(f"moves={moves!r}: two of them write the same bytes")
    device = source.device if source.is_cuda else target.device
    return [upload(move_M3, device)] if len(move_M3) else []


def run(source: Tensor, target: Tensor, batches: Iterable[Batch], tiles: Tiles = DEFAULT_TILES) -> None:
    """Launch every batch, from bytes of ``source`` to bytes of ``target`` (the same buffer for moves inside one)."""
    for batch in batches:
        dtype, constant = _ELEMENT[batch.unit_bytes], constants(batch.unit_bytes, tiles)
        grid = (ceil_div(batch.longest // dtype.itemsize, tiles.chunk_words), len(batch.move_M3))
        launcher(block_copy_kernel)[grid](
            elements(source, dtype), elements(target, dtype), batch.move_M3, **constant, **options(tiles)
        )


def block_copy(buffer: Tensor, moves: Sequence[Move]) -> int:
    """See :meth:`.LayerOperations.block_copy`.

    Raises:
        ValueError: a move leaves the buffer, or its source and destination overlap.
    """
    run(buffer, buffer, plan(buffer, moves))
    return sum(num_bytes for _, _, num_bytes in moves)
