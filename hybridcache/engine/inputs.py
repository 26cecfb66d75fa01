"""StepInputs: packs a step's rows on the host and hands them to the device at addresses that never change.

All host arrays of a step travel in one copy from pinned memory: the fields of :class:`StepFields`, then the rows of the table
that changed. Two staging buffers take turns, so that one can be packed while the other is still being copied.

Token ids are gathered on the device from ``feed``: ids sampled by the step before, which the host may not know yet, then those
that came with the step.

Shapes: T tokens, B rows of the step, R rows at most, P prefilling rows, L state layers, N table entries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridcache.engine.request import Request
from hybridcache.engine.step import ScheduledTokens, Shape
from hybridcache.kernels.batch import StepBatch

ALIGNMENT = 16
TOKEN_BYTES = 28
"""Bytes that one token packs: id, index into feed, position (int64) and row (int32)."""
ROW_BYTES = 32
"""Bytes that one row packs: context length, offset, start (int32), index of logits, changed row (int64), alignment."""
INLINE_ENTRIES = 1 << 18
"""Up to so many table entries (1 MB) travel with the other inputs; more go in a copy of their own."""


class StepFields(NamedTuple):
    """A packed step, but for its tables: arrays on the host, or tensors at the same places on the device. The places follow
    from the step's shape."""

    token: Any
    """int64 ``[T]``; token ids. This field comes first, because ``feed`` ends with it."""
    index: Any
    """int64 ``[T]``; each token's place in ``feed``."""
    position: Any
    """int64 ``[T]``; each token's position in its request."""
    row: Any
    """int32 ``[T]``; each token's table row."""
    context: Any
    """int32 ``[B]``; each row's tokens after the step."""
    cu_seqlens: Any
    """int32 ``[P + 1]``; offsets of the prefilling rows' tokens, from 0."""
    start: Any
    """int32 ``[P]``; position of each prefilling row's first token."""
    logit: Any
    """int64 ``[B]``; index of each row's last token."""

    @classmethod
    def cut(cls, packed: Any, shape: Shape, kinds: Any) -> "StepFields":
        """The fields in a flat array or tensor of bytes; ``kinds`` is the module that names its types."""
        return cls(*(packed[begin:end].view(getattr(kinds, kind)) for kind, begin, end in _places(shape)[:-1]))


@lru_cache(maxsize=1024)
def _places(shape: Shape) -> list[tuple[str, int, int]]:
    """Type, first byte and end of each field of :class:`StepFields`; the last entry is where they end."""
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
    """The bytes of a step that is nothing but padding. Its tokens belong to the last row and are all the same, so that together
    they hit no more experts than one does."""
    packed, decode = np.zeros(_places(shape)[-1][1], dtype=np.uint8), shape.decode
    fields = StepFields.cut(packed, shape, np)
    fields.index[:] = np.arange(feed_rows, feed_rows + shape.total_tokens)
    fields.row[:decode] = np.arange(decode)
    fields.row[decode:] = shape.rows - 1
    fields.logit[:decode] = np.arange(decode)
    fields.logit[decode:] = decode
    return packed


def pack(
    fields: StepFields,
    items: Sequence[ScheduledTokens],
    places: Sequence[int],
    shape: Shape,
    sampled: Mapping[int, int],
    feed_rows: int,
) -> None:
    """Write a step's rows into host arrays.

    Args:
        fields: padding, for a step of ``shape``.
        items: decodes first, then prefills, whose tokens follow one another.
        places: table row of each item; prefilling rows begin at ``shape.decode``.
        shape: the step's or a larger one. A shape with more prefill tokens than the step has one more prefilling row too.
        sampled: place in ``feed`` of the token that the last step sampled, by request.
        feed_rows: places in ``feed`` in front of the tokens that come with the step.
    """
    decode = shape.decode
    n = sum(place < decode for place in places)
    at = list(places[:n])
    starts = [start for _, start, _ in items[:n]]
    fields.position[at] = starts
    fields.context[at] = starts
    fields.context[at] += 1
    index = [sampled.get(seq.seq_id, -1) for seq, _, _ in items[:n]]
    if min(index, default=0) < 0:
        for i, place in enumerate(at):
            if index[i] < 0:
                index[i] = feed_rows + place
                fields.token[place] = _known(items[i])[0]
    fields.index[at] = index
    last = decode
    ends = [0] * (shape.prefill + 1)
    for item, place in zip(items[n:], places[n:]):
        _, start, count = item
        number, first = place - decode, last
        last = first + count
        fields.token[first:last] = _known(item)
        fields.position[first:last] = np.arange(start, start + count)
        fields.row[first:last] = place
        fields.context[place] = start + count
        fields.start[number] = start
        fields.logit[place] = last - 1
        ends[number + 1] = last - decode
    fields.cu_seqlens[:] = np.maximum.accumulate(ends)


def _known(item: ScheduledTokens) -> np.ndarray:
    """The item's token ids (int64), all of which have arrived at the host."""
    request, start, count = item
    assert isinstance(request, Request)
    assert start + count <= request.prompt_len + request.num_settled, f"request {request.seq_id}: a token is on its way"
    return request.tokens(start, start + count)


def pack_again(fields: StepFields, position_B: np.ndarray) -> None:
    """Fast path of :func:`pack` for a repeated decode step: row i decodes what row i sampled last; only positions (int64)
    advance."""
    n = len(position_B)
    fields.index[:n] = np.arange(n)
    fields.position[:n] = position_B
    fields.context[:n] = position_B
    fields.context[:n] += 1


def keep_sampling(fields: StepFields, samples: Sequence[bool], places: Sequence[int]) -> tuple[int, list[int]]:
    """Move the logits' indices of rows that sample to the front.

    Returns:
        The number of rows that sample, and each row's place among them (meaningless for a row that does not sample).
    """
    by_place = np.zeros(len(places), dtype=bool)
    by_place[places] = samples
    wanted = fields.logit[: len(places)][by_place]
    fields.logit[: len(wanted)] = wanted
    return len(wanted), (np.cumsum(by_place) - 1)[places].tolist()


class StepInputs:
    """Static inputs of one runner's steps; see the module.

    Args:
        max_rows: R.
        max_tokens: most tokens of a step.
        state_width: L.
        max_entries: N, KV entries of the longest request.
        device: the model's device.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, state_width: int, max_entries: int, device: torch.device
    ) -> None:
        self.max_rows = max_rows
        self.device = device
        self.state_width = state_width
        width = 2 * state_width + max_entries
        packed = packed_bytes(max_rows, max_tokens, width)
        self.feed = torch.zeros(max_rows + packed // 8, dtype=torch.int64, device=device)
        """Ids that the last step sampled (0 where an id is no token), then the packed inputs, which begin with token ids."""
        self.table = torch.full((max_rows, width), -1, dtype=torch.int32, device=device)
        """int32 ``[R, 2 L + N]``; a row holds its states' write entries, their read entries, then its KV entries."""
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """int64 ``[R]``; ids that the step samples."""
        self._packed = self.feed[max_rows:].view(torch.uint8)
        pinned = device.type == "cuda"
        self._staging = [torch.empty(self._packed.numel(), dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._arrays = [staging.numpy() for staging in self._staging]
        self._results = [torch.empty(max_rows, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._cut = lru_cache(maxsize=512)(lambda turn, shape: StepFields.cut(self._arrays[turn], shape, np))
        self._cut_on_device = lru_cache(maxsize=512)(lambda shape: StepFields.cut(self._packed, shape, torch))
        self._turn = 0
        self._cursor = 0
        self._updates: list[Callable[[], object]] = []

    # -- from the host to the device -------------------------------------------------------------------------------

    def begin(self, shape: Shape) -> StepFields:
        """Start packing a step of that shape. The fields returned hold padding."""
        self._turn ^= 1
        self._updates = []
        padding = _padding(shape, self.max_rows)
        self._cursor = len(padding)
        self._arrays[self._turn][: self._cursor] = padding
        return self._cut(self._turn, shape)

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Pack one array. Returns the tensor that holds it once :meth:`send` has run; the next step overwrites it."""
        start, end = self._cursor, self._cursor + array.nbytes
        self._arrays[self._turn][start:end].view(array.dtype)[:] = array.ravel()
        self._cursor = _aligned(end)
        return self._packed[start:end].view(getattr(torch, array.dtype.name)).view(array.shape)

    def put_rows(self, changed: Sequence[int], entries_BN: np.ndarray) -> None:
        """Pack the table's changed rows, from the host's copy of it (``entries_BN``, cut to the width that matters)."""
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

    @contextmanager
    def all_padding(self, shape: Shape) -> Iterator[torch.Tensor]:
        """Put a step of that shape that is nothing but padding in place for a warm-up, and give its table. Staging buffers,
        table and sampled ids are unchanged at the end."""
        kept = self.sampled.clone(), self.feed[: self.max_rows].clone()
        padding = torch.from_numpy(_padding(shape, self.max_rows))
        self._packed[: padding.numel()].copy_(padding)
        yield torch.full_like(self.table[: shape.rows], -1)
        self.sampled.copy_(kept[0])
        self.feed[: self.max_rows].copy_(kept[1])

    # -- on the device ---------------------------------------------------------------------------------------------

    def batch(
        self,
        shape: Shape,
        num_entries: int | None = None,
        num_logits: int | None = None,
        max_prefill_len: int = 0,
        max_context_len: int = 0,
        table: torch.Tensor | None = None,
    ) -> StepBatch:
        """The step of that shape in static memory, as the model reads it. ``num_entries`` cuts the KV tables and ``num_logits``
        the logits (None: all). ``max_prefill_len`` may exceed the longest row's; no graph reads ``max_context_len``. ``table``
        replaces the static table (warm-ups)."""
        fields = self._cut_on_device(shape)
        table, width = (self.table if table is None else table)[: shape.rows], self.state_width
        first = 2 * width
        every_token = shape.prefill == 0 and num_logits in (None, shape.decode)
        return StepBatch(
            token_ids_T=self.feed.index_select(0, fields.index),
            position_T=fields.position,
            row_T=fields.row,
            kv_table_BN=table[:, first : None if num_entries is None else first + num_entries],
            state_read_BL=table[:, width:first],
            state_write_BL=table[:, :width],
            context_len_B=fields.context,
            prefill_cu_seqlens=fields.cu_seqlens,
            prefill_start_P=fields.start,
            logit_index_R=None if every_token else fields.logit[:num_logits],
            num_decode=shape.decode,
            max_prefill_len=max_prefill_len,
            max_context_len=max_context_len,
        )

    def feed_sampled(self, count: int) -> None:
        """Copy the first sampled ids, which have changed, to where the next step reads them."""
        torch.clamp_min(self.sampled[:count], 0, out=self.feed[:count])

    # -- from the device to the host -------------------------------------------------------------------------------

    def fetch(self, count: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying the first sampled ids to the host. The tensor returned is valid from the event until the step after the
        next one is packed."""
        result = self._results[self._turn][:count]
        result.copy_(self.sampled[:count], non_blocking=True)
        if self.device.type != "cuda":
            return result, None
        event = torch.cuda.Event()
        event.record()
        return result, event


def padding_batch(rows: int, tokens: int, table_RN: torch.Tensor) -> StepBatch:
    """A step that prefills ``tokens`` tokens in ``rows`` rows of padding, so that it reads and writes no byte of the cache.
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
    """Bytes that suffice for everything one step packs; a row of the table has ``width`` entries."""
    room = max_tokens * TOKEN_BYTES + (max_rows + 1) * ROW_BYTES + 16 * ALIGNMENT
    return _aligned(room + 4 * min(max_rows * width, INLINE_ENTRIES))


def input_bytes(max_rows: int, max_tokens: int, width: int) -> int:
    """Bytes that a :class:`StepInputs` takes of the device."""
    return packed_bytes(max_rows, max_tokens, width) + max_rows * (4 * width + 3 * 8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
