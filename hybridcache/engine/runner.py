"""ModelRunner: one step's rows as a batch on the device, through the model, to sampled token ids.

Shapes: T tokens of the step, B rows, N table entries, R rows that sample.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hybridcache.batch import StepBatch
from hybridcache.engine.sampling import SamplingRow, sample
from hybridcache.kernels.backend import Backend
from hybridcache.layout import Layout
from hybridcache.pool import CachePool
from hybridcache.strategies.base import Strategy


class Model(Protocol):
    """What the engine needs of a model."""

    config: Any
    """The Transformers config; the engine reads ``vocab_size``."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: StepBatch, buffer: torch.Tensor, layout: Layout, backend: Backend) -> torch.Tensor:
        """Run the step; caches are read and written in ``buffer`` only. Returns logits ``[R, vocabulary]`` of the tokens
        in ``batch.logit_index_R``, float32, or float64 for a float64 model."""
        ...


class RowInput(NamedTuple):
    """Tokens ``start ..`` of one resident request, to be computed in this step."""

    seq_id: int
    start: int
    token_ids: np.ndarray
    """int64."""
    sampling: SamplingRow | None
    """How to sample the token after the last one; None where a prompt goes on in a later step."""

    @property
    def is_decode(self) -> bool:
        return len(self.token_ids) == 1 and self.start > 0


class ModelRunner:
    """Owns the pool; runs rows through the model.

    Args:
        model: see :class:`Model`.
        strategy: built with ``physical=True``; whoever schedules has taken the memory that the rows need.
        backend: runs the cache operations.
        poison: fill the pool with NaN patterns first (tests).
    """

    def __init__(self, model: Model, strategy: Strategy, backend: Backend, *, poison: bool = False) -> None:
        self.model = model
        self.strategy = strategy
        self.backend = backend
        self.layout = strategy.layout
        self.pool = CachePool(self.layout, model.device, poison=poison)

    def relocate(self) -> None:
        """Execute the strategy's pending moves. Must precede every :meth:`run` after memory was taken or returned."""
        moves = self.strategy.drain_moves()
        if moves:
            self.backend.block_copy(self.pool.buffer, [(move.src, move.dst, move.num_bytes) for move in moves])

    def run(self, rows: Sequence[RowInput]) -> list[int]:
        """Compute the rows' tokens; returns a sampled id for each row that samples, in order
        (:data:`~hybridcache.engine.sampling.NOT_FINITE` where its logits are not finite).

        The rows must be ordered decode first.
        """
        with torch.inference_mode():
            batch = build_batch(rows, self.strategy, self.pool.buffer.device)
            logits_RV = self.model.forward(batch, self.pool.buffer, self.layout, self.backend)
            sampling = [row.sampling for row in rows if row.sampling is not None]
            return sample(logits_RV, sampling) if sampling else []

    def poison(self, seq_id: int) -> None:
        """Overwrite everything that a resident request holds with NaN patterns (tests, before its release)."""
        self.relocate()  # spans tell where the request is after the pending moves
        self.pool.poison(span for span in self.strategy.spans() if span.seq_id == seq_id)


def build_batch(rows: Sequence[RowInput], strategy: Strategy, device: torch.device) -> StepBatch:
    """The rows as device tensors: built in numpy, then one copy per tensor."""
    num_rows = len(rows)
    num_decode = sum(row.is_decode for row in rows)
    starts = np.fromiter((row.start for row in rows), np.int64, num_rows)
    lengths = np.fromiter((len(row.token_ids) for row in rows), np.int64, num_rows)
    ends = np.cumsum(lengths)
    row_T = np.repeat(np.arange(num_rows, dtype=np.int32), lengths)
    position_T = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    prefill_cu_seqlens = np.zeros(num_rows - num_decode + 1, dtype=np.int32)
    np.cumsum(lengths[num_decode:], out=prefill_cu_seqlens[1:])
    samples = np.fromiter((row.sampling is not None for row in rows), bool, num_rows)
    context = starts + lengths
    tables = strategy.tables([row.seq_id for row in rows])

    def put(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return StepBatch(
        token_ids_T=put(np.concatenate([row.token_ids for row in rows])),
        position_T=put(position_T),
        row_T=put(row_T),
        kv_table_BN=put(tables.kv),
        state_table_BL=put(tables.state),
        context_len_B=put(context.astype(np.int32)),
        prefill_cu_seqlens=put(prefill_cu_seqlens),
        logit_index_R=put((ends - 1)[samples]),
        num_decode=num_decode,
        max_prefill_len=int(lengths[num_decode:].max(initial=0)),
        max_context_len=int(context.max()),
    )
