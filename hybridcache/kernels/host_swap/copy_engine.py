"""Host swap through the device's copy engines.

A manager block is some MiB, which one DMA transfer moves at the speed of the bus, and copy engines take no multiprocessor
from the kernels that run meanwhile. A kernel that reads pinned memory would take some and be no faster; it pays off only
for pieces of a few KiB, which the pool does not swap. Transfers out and in have a stream each, since the bus carries both
directions at once.

On a CPU the same calls copy at once; nothing there is asynchronous.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hybridcache.errors import bad

Range = tuple[int, int, int]
"""``(from, to, bytes)``."""


class HostPool:
    """``num_slots`` slots of ``block_bytes`` bytes in one flat host buffer, pinned where there is CUDA.

    Raises:
        UserError: a size is not positive.
    """

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        for field, value in (("num_slots", num_slots), ("block_bytes", block_bytes)):
            if value <= 0:
                raise bad(field, value, "choose a positive number")
        self.num_slots, self.block_bytes = num_slots, block_bytes
        self.buffer = torch.empty(num_slots * block_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._busy: dict[int, torch.cuda.Event] = {}

    def events(self, slots: Sequence[int]) -> set[torch.cuda.Event]:
        """Ends of the unfinished transfers that read or write these slots."""
        self._busy = {slot: event for slot, event in self._busy.items() if not event.query()}
        return {self._busy[slot] for slot in slots if slot in self._busy}

    def occupy(self, slots: Sequence[int], event: torch.cuda.Event) -> None:
        """A transfer that ends with ``event`` reads or writes these slots."""
        self._busy.update(dict.fromkeys(slots, event))


class Transfer:
    """One swap under way; on a CPU it is over already."""

    def __init__(self, num_bytes: int, event: torch.cuda.Event | None) -> None:
        self.num_bytes = num_bytes
        self.event = event

    def done(self) -> bool:
        """Whether all bytes have arrived."""
        return self.event is None or self.event.query()

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Let a stream (the current one where None) go on only after the transfer; the host does not wait. Needed before
        blocks that were swapped out are written again, and before blocks that were swapped in are read."""
        if self.event is not None:
            (stream or torch.cuda.current_stream()).wait_event(self.event)

    def synchronize(self) -> None:
        """Wait on the host, for example to read the host buffer."""
        if self.event is not None:
            self.event.synchronize()


class HostSwap:
    """Swaps blocks of one device buffer: block ``b`` lies at byte ``b * block_bytes``.

    A transfer starts after all work that the calling stream has been given so far, and after earlier transfers that use the
    same host slots. Transfers of one direction run in order. What a transfer does to blocks of the buffer is ordered with
    later work on them, other transfers included, by ``wait`` alone.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._out_stream = torch.cuda.Stream(buffer.device) if buffer.is_cuda else None
        self._in_stream = torch.cuda.Stream(buffer.device) if buffer.is_cuda else None

    def swap_out(self, blocks: Sequence[int], host: HostPool, slots: Sequence[int]) -> Transfer:
        """Copy blocks of the buffer to host slots, pair by pair. The blocks may be written again after ``wait``.

        Raises:
            UserError: a block or slot does not exist, comes twice, or their numbers differ.
        """
        size = host.block_bytes
        ranges = [(block * size, slot * size, count * size) for block, slot, count in self._runs(blocks, host, slots)]
        return self._swapped(host, slots, lambda after: self.copy_out(ranges, host.buffer, after))

    def swap_in(self, host: HostPool, slots: Sequence[int], blocks: Sequence[int]) -> Transfer:
        """Copy host slots to blocks of the buffer, pair by pair. The blocks may be read after ``wait``; the slots hold
        their bytes until they are overwritten.

        Raises:
            UserError: a block or slot does not exist, comes twice, or their numbers differ.
        """
        size = host.block_bytes
        ranges = [(slot * size, block * size, count * size) for block, slot, count in self._runs(blocks, host, slots)]
        return self._swapped(host, slots, lambda after: self.copy_in(host.buffer, ranges, after))

    def copy_out(self, ranges: Iterable[Range], host: Tensor, after: Iterable[torch.cuda.Event] = ()) -> Transfer:
        """Copy ``(from, to, bytes)`` ranges of the buffer to a flat pinned uint8 tensor, once the events have happened."""
        return self._start(ranges, self.buffer, host, self._out_stream, after)

    def copy_in(self, host: Tensor, ranges: Iterable[Range], after: Iterable[torch.cuda.Event] = ()) -> Transfer:
        """Copy ``(from, to, bytes)`` ranges of a flat pinned uint8 tensor to the buffer, once the events have happened."""
        return self._start(ranges, host, self.buffer, self._in_stream, after)

    def _swapped(
        self, host: HostPool, slots: Sequence[int], start: Callable[[Iterable[torch.cuda.Event]], Transfer]
    ) -> Transfer:
        """A transfer after those that use the same slots."""
        transfer = start(host.events(slots))
        if transfer.event is not None:
            host.occupy(slots, transfer.event)
        return transfer

    def _runs(self, blocks: Sequence[int], host: HostPool, slots: Sequence[int]) -> list[tuple[int, int, int]]:
        """``(block, slot, count)`` of neighbours that stay neighbours: one transfer moves them."""
        num_blocks = self.buffer.numel() // host.block_bytes
        if len(blocks) != len(slots):
            raise bad("slots", list(slots), f"give one for each of {len(blocks)} blocks")
        for field, chosen, count in (("blocks", blocks, num_blocks), ("slots", slots, host.num_slots)):
            if len(set(chosen)) != len(chosen) or not all(0 <= index < count for index in chosen):
                raise bad(field, list(chosen), f"choose distinct ones from 0 .. {count - 1}")
        runs: list[tuple[int, int, int]] = []
        for block, slot in zip(blocks, slots):
            if runs and block == runs[-1][0] + runs[-1][2] and slot == runs[-1][1] + runs[-1][2]:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((block, slot, 1))
        return runs

    def _start(
        self, ranges: Iterable[Range], source: Tensor, target: Tensor, stream: torch.cuda.Stream | None,
        after: Iterable[torch.cuda.Event],
    ) -> Transfer:  # fmt: skip
        ranges = list(ranges)
        num_bytes = sum(count for _, _, count in ranges)

        def copy() -> None:
            for src, dst, count in ranges:
                target[dst : dst + count].copy_(source[src : src + count], non_blocking=True)

        if stream is None:
            copy()
            return Transfer(num_bytes, None)
        stream.wait_stream(torch.cuda.current_stream(self.buffer.device))
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            copy()
            end = torch.cuda.Event()
            end.record(stream)
        return Transfer(num_bytes, end)
