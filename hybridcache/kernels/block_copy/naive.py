"""Reference of the block copy: one slice assignment per move."""

from collections.abc import Sequence

from torch import Tensor


def block_copy(buffer: Tensor, moves: Sequence[tuple[int, int, int]]) -> int:
    """See :meth:`.LayerOperations.block_copy`."""
    total = 0
    for src, dst, num_bytes in moves:
        buffer[dst : dst + num_bytes] = buffer[src : src + num_bytes].clone()
        total += num_bytes
    return total
