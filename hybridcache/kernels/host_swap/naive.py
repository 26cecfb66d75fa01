"""Reference of the host swap: one block after the other, done when it returns."""

from collections.abc import Sequence

from torch import Tensor


def swap(
    source: Tensor, source_blocks: Sequence[int], target: Tensor, target_blocks: Sequence[int], block_bytes: int
) -> None:
    """Copy blocks of ``block_bytes`` bytes from one flat uint8 buffer to another, pair by pair."""
    for src, dst in zip(source_blocks, target_blocks, strict=True):
        block = source[src * block_bytes : (src + 1) * block_bytes]
        target[dst * block_bytes : (dst + 1) * block_bytes] = block.to(target.device)
