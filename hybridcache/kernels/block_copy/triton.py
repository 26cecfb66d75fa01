"""Block copy in Triton: byte ranges of the pool to other ranges of it, executed as if one after the other.

Moves that do not depend on each other run in one launch: a launch is closed before a move that reads or overwrites what an
earlier move of that launch writes, or overwrites what one reads.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcache.kernels.memory import elements

CHUNK_WORDS = 1024
"""Words that one program copies: 8 KiB of 16-byte vectors."""
MAX_MOVES = 65_535
"""Moves of one launch at most: the largest second dimension of a CUDA grid."""

Move = tuple[int, int, int]


@triton.jit
def block_copy_kernel(
    pool_ptr,
    move_ptr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``move_ptr`` holds ``(src, dst, length)`` in units of ``WORDS`` pool elements, so that the compiler sees every
    address to be a multiple of the unit and moves whole vectors."""
    move = move_ptr + 3 * tl.program_id(1)
    src = tl.load(move)
    dst = tl.load(move + 1)
    length = tl.load(move + 2) * WORDS
    word = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = word < length
    data = tl.load(pool_ptr + src * WORDS + word, mask=inside, other=0)
    tl.store(pool_ptr + dst * WORDS + word, data, mask=inside)


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


def unit(moves: Iterable[Move]) -> int:
    """Largest of 16, 8, 4, 2, 1 bytes that divides every address and length."""
    bits = 16
    for move in moves:
        for value in move:
            bits |= value
    return bits & -bits


_ELEMENT = {16: torch.int64, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def constants(unit_bytes: int) -> dict[str, int]:
    """Compile-time parameters of :func:`block_copy_kernel`."""
    return {"WORDS": 2 if unit_bytes == 16 else 1, "CHUNK": CHUNK_WORDS}


def options() -> dict[str, Any]:
    """Launch options."""
    return {"num_warps": 4}


def block_copy(buffer: torch.Tensor, moves: Sequence[Move]) -> int:
    """See :meth:`hybridcache.kernels.backend.Backend.block_copy`.

    Raises:
        ValueError: a move leaves the buffer, or its source and destination overlap.
    """
    for src, dst, num_bytes in moves:
        if num_bytes < 0 or min(src, dst) < 0 or max(src, dst) + num_bytes > buffer.numel():
            raise ValueError(f"move={(src, dst, num_bytes)}: leaves the buffer of {buffer.numel()} bytes")
        if abs(src - dst) < num_bytes:
            raise ValueError(f"move={(src, dst, num_bytes)}: source and destination overlap")
    batches = independent_batches(move for move in moves if move[2])
    for batch in batches:
        unit_bytes = unit(batch)
        dtype, constant = _ELEMENT[unit_bytes], constants(unit_bytes)
        move_M3 = torch.tensor(batch, dtype=torch.int64) // unit_bytes
        if buffer.is_cuda:
            move_M3 = move_M3.pin_memory().to(buffer.device, non_blocking=True)
        words = max(move[2] for move in batch) // dtype.itemsize
        grid = (triton.cdiv(words, CHUNK_WORDS), len(batch))
        block_copy_kernel[grid](elements(buffer, dtype), move_M3, **constant, **options())
    return sum(num_bytes for _, _, num_bytes in moves)
