"""HostCopies: the bytes of checkpoints on their way to pinned host memory and back, beside the steps of the engine.

Where a checkpoint lies on the device is known only once pending moves are executed, so they are before a copy is asked for. A
copy starts after all steps launched so far. Blocks that are given back while a copy still reads or writes them, and blocks
that compaction moves, are the only ones for which a later step waits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hybridcache.kernels.host_swap.copy_engine import HostPool, HostSwap, Range, Transfer
from hybridcache.memory.spans import Units
from hybridcache.prefix.host_store import HostCopy, HostStore
from hybridcache.strategies.base import Strategy


class HostCopies:
    """See the module.

    Args:
        strategy: physical.
        store: whose chunks are the slots of the host buffer.
        buffer: the pool's.
        relocate: executes pending moves.

    Raises:
        UserError: host memory holds not even one chunk.
    """

    def __init__(
        self, strategy: Strategy, store: HostStore, buffer: torch.Tensor, relocate: Callable[[], None]
    ) -> None:
        self.strategy, self.store, self._relocate = strategy, store, relocate
        self.overlaps = False
        """Whether steps run on while bytes are copied. Off: with copies that arrive late, a request in some hundred read bytes
        that were not there (docs/LOG.md); the steps launched after a copy wait for it on the device."""
        self.at_once = not (buffer.is_cuda and self.overlaps)
        self.host = HostPool(store.num_chunks, store.chunk_bytes)
        self.swap = HostSwap(buffer)
        self._moved = strategy.bytes_moved
        self._flying: list[Transfer] = []
        self._reused: list[Transfer] = []

    def out(self, key: int, copy: HostCopy) -> Transfer | None:
        """See :class:`~hybridcache.prefix.host_tier.Mover`."""
        self._relocate()
        device, host = self._places(key, copy, len(self.store.read(copy, 0)) - copy.own)
        return self._fly(self.swap.copy_out(_ranges(device, host, self.store.chunk_bytes), self.host.buffer))

    def back(self, key: int, copy: HostCopy, start: int, num_bytes: int) -> Transfer | None:
        """See :class:`~hybridcache.prefix.host_tier.Mover`."""
        self._relocate()
        device, host = self._places(key, copy, start)
        # Its own transfer ended last of all that wrote what it holds; its blocks may still be read by others.
        after = [] if copy.done else [copy.transfer.event]
        after += [transfer.event for transfer in self._reused if transfer.event is not None]
        return self._fly(self.swap.copy_in(self.host.buffer, _ranges(host, device, self.store.chunk_bytes), after))

    def reused(self, transfer: Any) -> None:
        """See :class:`~hybridcache.prefix.host_tier.Mover`."""
        if not transfer.done():
            self._reused.append(transfer)

    def before_writing(self) -> None:
        """To be called before moves are executed and steps launched: they wait for copies of blocks that they may write."""
        if self._flying or self._reused:
            compacted = self.strategy.bytes_moved != self._moved
            for transfer in self._flying if compacted else self._reused:
                transfer.wait()
            self._reused = []  # what starts from now on, copies included, starts after them
            self._flying = [transfer for transfer in self._flying if not transfer.done()]
        self._moved = self.strategy.bytes_moved

    def _fly(self, transfer: Transfer) -> Transfer | None:
        if not self.overlaps:
            transfer.wait()
            return None
        if transfer.done():
            return None
        self._flying = [other for other in self._flying if not other.done()]
        self._flying.append(transfer)
        return transfer

    def _places(self, key: int, copy: HostCopy, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Byte offsets, on the device and on the host, of the chunks of the states, then of the KV from chunk ``start`` on."""
        states, kv = self.strategy.cached_units(key)
        cut, size = self.strategy.cut, self.store.chunk_bytes
        device = [_chunks(cut.state, states, size), _chunks(cut.kv, kv, size)[start:]]
        host = np.array([*copy.states, *self.store.read(copy, start)], dtype=np.int64) * size
        found = np.concatenate(device)
        assert len(found) == len(host)
        return found, host


def _chunks(units: Units, numbers: Sequence[int], size: int) -> np.ndarray:
    """Offsets (int64) of the chunks of these units, in order."""
    first = np.asarray(numbers, dtype=np.int64)[:, None, None] * units.stride
    inside = np.arange(units.stride // size, dtype=np.int64) * size
    return (first + np.asarray(units.bases, dtype=np.int64)[:, None] + inside).ravel()


def _ranges(source: np.ndarray, target: np.ndarray, size: int) -> list[Range]:
    """``(from, to, bytes)`` of chunks, pair by pair; neighbours that stay neighbours are copied together."""
    apart = np.flatnonzero((np.diff(source) != size) | (np.diff(target) != size)) + 1
    starts = np.concatenate([[0], apart]) if len(source) else apart
    counts = np.diff(np.append(starts, len(source))) * size
    return list(zip(source[starts].tolist(), target[starts].tolist(), counts.tolist()))
