"""StepInputs: the device memory of a step's inputs and of what it samples, at addresses that never change.

All inputs of a step travel in one copy, from one of two pinned buffers that take turns, so that the next step can be
packed while the last one's copy is under way. Sampled ids stay on the device, where the next step reads them: a token is named
by its index into ``feed``, which holds the ids sampled last and, behind them, the ids that came with the step.

Shapes: T tokens, B rows, R most rows, L state layers, N table entries.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridcache.engine.graphs import Shape
from hybridcache.kernels.batch import StepBatch

ALIGNMENT = 16
TOKEN_BYTES = 28
"""Id, index into feed, position (int64) and row (int32)."""
ROW_BYTES = 32
"""Context length, offset, start (int32), index of logits, number of a changed row (int64), and room for alignment."""
INLINE_ENTRIES = 1 << 18
"""Table entries that travel with the other inputs; more (1 MB) go in a copy of their own."""


class StepFields(NamedTuple):
    """What a step reads beside tables, each packed at a place that follows from its shape: host arrays, or what they are on the
    device."""

    token: Any
    """int64 ``[T]``; first of all, because ``feed`` ends with it."""
    index: Any
    """int64 ``[T]``; where in ``feed`` each token is."""
    position: Any
    """int64 ``[T]``."""
    row: Any
    """int32 ``[T]``."""
    context: Any
    """int32 ``[B]``."""
    cu_seqlens: Any
    """int32 ``[P + 1]``, of the prefilling rows, from 0."""
    start: Any
    """int32 ``[P]``."""
    logit: Any
    """int64 ``[B]``; every row's last token."""

    @classmethod
    def cut(cls, packed: Any, shape: Shape, kinds: Any) -> "StepFields":
        """The fields in a flat array or tensor of bytes; ``kinds`` is the module that names its types."""
        return cls(*(packed[begin:end].view(getattr(kinds, kind)) for kind, begin, end in _places(shape)[:-1]))


@lru_cache(maxsize=1024)
def _places(shape: Shape) -> list[tuple[str, int, int]]:
    """Type, first byte and end of each of :class:`StepFields`, and of what comes behind them."""
    tokens, rows, prefill = shape.total_tokens, shape.rows, shape.prefill
    counts = [("int64", tokens)] * 3 + [("int32", tokens), ("int32", rows), ("int32", prefill + 1), ("int32", prefill)]
    found, cursor = [], 0
    for kind, count in (*counts, ("int64", rows)):
        end = cursor + count * np.dtype(kind).itemsize
        found.append((kind, cursor, end))
        cursor = _aligned(end)
    return [*found, ("", cursor, cursor)]


@lru_cache(maxsize=256)
def _padding(shape: Shape, feed_rows: int) -> np.ndarray:
    """The bytes of a step that is nothing but padding: rows that have no tokens and do not decode, and tokens of the last row,
    all of them the same, so that together they hit no more experts than one of them."""
    packed, decode = np.zeros(_places(shape)[-1][1], dtype=np.uint8), shape.decode
    fields = StepFields.cut(packed, shape, np)
    fields.index[:] = np.arange(feed_rows, feed_rows + shape.total_tokens)
    fields.row[:decode] = np.arange(decode)
    fields.row[decode:] = shape.rows - 1
    fields.logit[:decode] = np.arange(decode)
    fields.logit[decode:] = decode
    return packed


class StepInputs:
    """See the module.

    Args:
        max_rows: R.
        max_tokens: most tokens of a step.
        state_width: L.
        max_entries: N, of the longest request.
        device: where the model is.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, state_width: int, max_entries: int, device: torch.device
    ) -> None:
        self.max_rows = max_rows
        self.device = device
        self.state_width = state_width
        width = state_width + max_entries
        packed = packed_bytes(max_rows, max_tokens, width)
        self.feed = torch.zeros(max_rows + packed // 8, dtype=torch.int64, device=device)
        """Ids sampled last (0 for one that is not a token), then the packed inputs, whose token ids come first."""
        self.table = torch.full((max_rows, width), -1, dtype=torch.int32, device=device)
        """State table, then KV table of every row."""
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """Ids that the step samples."""
        self._packed = self.feed[max_rows:].view(torch.uint8)
        pinned = device.type == "cuda"
        self._staging = [torch.empty(self._packed.numel(), dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._arrays = [staging.numpy() for staging in self._staging]
        self._results = [torch.empty(max_rows, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._cut = lru_cache(maxsize=512)(lambda turn, shape: StepFields.cut(self._arrays[turn], shape, np))
        self._turn = 0
        self._cursor = 0
        self._updates: list[Callable[[], object]] = []

    # -- from the host to the device -------------------------------------------------------------------------------

    def begin(self, shape: Shape) -> StepFields:
        """Start packing a step of that shape. Its fields hold padding."""
        self._turn ^= 1
        self._updates = []
        padding = _padding(shape, self.max_rows)
        self._cursor = len(padding)
        self._arrays[self._turn][: self._cursor] = padding
        return self._cut(self._turn, shape)

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Pack one array. Returns where it will be on the device once :meth:`send` has run; the next step overwrites it."""
        start, end = self._cursor, self._cursor + array.nbytes
        self._arrays[self._turn][start:end].view(array.dtype)[:] = array.ravel()
        self._cursor = _aligned(end)
        return self._packed[start:end].view(getattr(torch, array.dtype.name)).view(array.shape)

    def put_rows(self, changed: Sequence[int], entries_BN: np.ndarray) -> None:
        """Rows of the table to be rewritten, from the host's copy of it (``entries_BN``, cut to the width that matters)."""
        if not changed:
            return
        rows = self.put(np.array(changed, dtype=np.int64))
        values = entries_BN[changed]
        if values.size <= INLINE_ENTRIES:
            entries = self.put(values)
        else:
            entries = torch.from_numpy(values).to(self.device)
        part = self.table[:, : values.shape[1]]
        self._updates.append(lambda: part.index_copy_(0, rows, entries))

    def send(self) -> None:
        """Copy what was packed, then rewrite the changed rows of the table. Nothing waits for either."""
        self._packed[: self._cursor].copy_(self._staging[self._turn][: self._cursor], non_blocking=True)
        for update in self._updates:
            update()

    # -- on the device ---------------------------------------------------------------------------------------------

    def tokens(self, index_T: torch.Tensor) -> torch.Tensor:
        """Token ids from their places in ``feed``."""
        return self.feed.index_select(0, index_T)

    def batch(
        self,
        shape: Shape,
        num_entries: int | None = None,
        num_logits: int | None = None,
        max_prefill_len: int = 0,
        max_context_len: int = 0,
    ) -> StepBatch:
        """A step of that shape from static memory, with as many entries of every row's KV table and as many logits, or all
        (None). ``max_prefill_len`` may be more than the longest row's; nothing in a graph reads the longest context."""
        fields = StepFields.cut(self._packed, shape, torch)
        table, width = self.table[: shape.rows], self.state_width
        states = table[:, :width]
        every_token = shape.prefill == 0 and num_logits in (None, shape.decode)
        return StepBatch(
            token_ids_T=self.tokens(fields.index),
            position_T=fields.position,
            row_T=fields.row,
            kv_table_BN=table[:, width : None if num_entries is None else width + num_entries],
            state_read_BL=states,
            state_write_BL=states,
            context_len_B=fields.context,
            prefill_cu_seqlens=fields.cu_seqlens,
            prefill_start_P=fields.start,
            logit_index_R=None if every_token else fields.logit[:num_logits],
            num_decode=shape.decode,
            max_prefill_len=max_prefill_len,
            max_context_len=max_context_len,
        )

    def feed_sampled(self, count: int) -> None:
        """Let the next step read the first sampled ids, which have changed."""
        torch.clamp_min(self.sampled[:count], 0, out=self.feed[:count])

    # -- from the device to the host -------------------------------------------------------------------------------

    def fetch(self, count: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying the first sampled ids to the host. What is returned is valid after the event, until the step after
        the next one is packed."""
        result = self._results[self._turn][:count]
        result.copy_(self.sampled[:count], non_blocking=True)
        if self.device.type != "cuda":
            return result, None
        event = torch.cuda.Event()
        event.record()
        return result, event


def padding_batch(rows: int, tokens: int, table_RN: torch.Tensor) -> StepBatch:
    """A step that prefills ``tokens`` tokens in ``rows`` rows, all of them padding: no byte of the cache is read or written.
    ``table_RN`` gives device and width of a table."""
    device, rows = table_RN.device, min(rows, tokens)
    ends = np.linspace(0, tokens, rows + 1).astype(np.int32)
    offsets = torch.from_numpy(ends).to(device)
    length_P = offsets[1:] - offsets[:-1]
    empty = torch.full((rows, table_RN.shape[1]), -1, dtype=torch.int32, device=device)
    row_T = torch.from_numpy(np.repeat(np.arange(rows, dtype=np.int32), np.diff(ends))).to(device)
    return StepBatch(
        token_ids_T=torch.zeros(tokens, dtype=torch.int64, device=device),
        position_T=torch.zeros(tokens, dtype=torch.int64, device=device),
        row_T=row_T,
        kv_table_BN=empty,
        state_read_BL=empty,
        state_write_BL=empty,
        context_len_B=length_P,
        prefill_cu_seqlens=offsets,
        prefill_start_P=torch.zeros(rows, dtype=torch.int32, device=device),
        logit_index_R=offsets[1:].long() - 1,
        num_decode=0,
        max_prefill_len=int(np.diff(ends).max()),
        max_context_len=int(np.diff(ends).max()),
    )


def packed_bytes(max_rows: int, max_tokens: int, width: int) -> int:
    """Room for everything that one step packs; a row of the table is ``width`` entries."""
    room = max_tokens * TOKEN_BYTES + (max_rows + 1) * ROW_BYTES + 16 * ALIGNMENT
    return _aligned(room + 4 * min(max_rows * width, INLINE_ENTRIES))


def input_bytes(max_rows: int, max_tokens: int, width: int) -> int:
    """What a :class:`StepInputs` takes of the device."""
    return packed_bytes(max_rows, max_tokens, width) + max_rows * (4 * width + 3 * 8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
