"""CachePool: the one device buffer that a physical strategy's bytes are.

No other persistent tensor holds KV or states. Kernels get the flat ``uint8`` buffer and a layout.
"""

from collections.abc import Iterable

import torch

from hybridcache.memory.layout import Layout
from hybridcache.memory.spans import Move, Span

POISON_BYTE = 0xFF
"""Every element type reads as NaN when all its bytes are 0xFF."""


class CachePool:
    """``layout.pool_bytes`` bytes on one device.

    Args:
        layout: of a strategy built with ``physical=True``.
        device: torch device.
        poison: fill the buffer with NaN patterns first, so that a read of memory that nothing wrote shows.
    """

    def __init__(self, layout: Layout, device: str | torch.device = "cpu", *, poison: bool = False) -> None:
        self.layout = layout
        self.buffer = torch.empty(layout.pool_bytes, dtype=torch.uint8, device=device)
        if poison:
            self.buffer.fill_(POISON_BYTE)

    def poison(self, spans: Iterable[Span]) -> None:
        """Overwrite spans with NaN patterns."""
        for span in spans:
            self.buffer[span.offset : span.offset + span.num_bytes].fill_(POISON_BYTE)

    def apply(self, moves: Iterable[Move]) -> int:
        """Execute relocations in order with plain copies. Returns the bytes moved. (Backends offer ``block_copy``.)"""
        total = 0
        for move in moves:
            self.buffer[move.dst : move.dst + move.num_bytes] = self.buffer[move.src : move.src + move.num_bytes]
            total += move.num_bytes
        return total
