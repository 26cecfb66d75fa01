"""ModelRunner: one step's rows as a batch on the device, through the model, to sampled token ids.

A step is launched, and its ids are fetched later: on CUDA nothing here waits for the device. Steps run as a CUDA graph where
there is one that holds them.

Shapes: T tokens of the step, B rows, R rows that sample.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hybridcache.engine.footprint import Memory
from hybridcache.engine.graphs import Capture, Shape, StepGraphs, graph_sizes, prefill_shapes
from hybridcache.engine.inputs import StepInputs, input_bytes, padding_batch
from hybridcache.engine.packing import RowInput, fill, fill_again, keep_sampling, shape_of
from hybridcache.engine.row_table import RowTable
from hybridcache.engine.sampling import GREEDY, SamplingRow, draw, sampling_bytes
from hybridcache.kernels.backend import Backend, Caches
from hybridcache.kernels.batch import StepBatch
from hybridcache.memory.pool import CachePool
from hybridcache.strategies.base import Strategy


class Model(Protocol):
    """What the engine needs of a model."""

    config: Any
    """The Transformers config; the engine reads ``vocab_size``."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def waits(self) -> str | None:
        """Why a forward pass waits for the device, so that no CUDA graph can hold it; None where it does not."""
        ...

    @property
    def weight_bytes(self) -> int: ...

    def scratch_bytes(self, tokens: int, rows: int, prefilling: int) -> int:
        """Upper bound of what a forward pass of that many tokens in that many rows holds at once, where all rows sample and
        ``prefilling`` of them prefill."""
        ...

    def forward(self, batch: StepBatch, caches: Caches) -> torch.Tensor:
        """Run the step; what it keeps of requests lies in ``caches`` only. Returns logits ``[R, vocabulary]`` of the tokens
        that ``batch.logit_index_R`` names, in the model's dtype or a wider one."""
        ...


class Flight:
    """A launched step whose ids are on their way to the host."""

    def __init__(self, ids: torch.Tensor, places: list[int], event: torch.cuda.Event | None) -> None:
        self._ids, self._places, self._event = ids, places, event

    def wait(self) -> list[int]:
        """The sampled id of each row that samples, in the order in which the rows were given
        (:data:`~hybridcache.engine.sampling.NOT_FINITE` where its logits are not finite)."""
        if self._event is not None:
            self._event.synchronize()
        ids = self._ids.tolist()
        return [ids[place] for place in self._places]


class _Steady(NamedTuple):
    """The step launched last, if it may be launched again one token further: a graph in which every row decodes greedily."""

    shape: Shape
    """Of the graph."""
    slots: list[int]
    """Places of the rows, in the order given."""
    position: np.ndarray
    """By place."""


class ModelRunner:
    """Owns the pool; runs rows through the model.

    Args:
        model: see :class:`Model`.
        strategy: built with ``physical=True``; whoever schedules has taken the memory that the rows need.
        backend: runs the cache operations.
        max_rows: most rows of a step.
        max_tokens: most tokens of a step.
        capture: records decode steps as graphs; None runs them as all others.
        poison: fill the pool with NaN patterns first (tests).

    Raises:
        UserError: cache and workspace do not fit the device.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        backend: Backend,
        *,
        max_rows: int,
        max_tokens: int,
        capture: Capture | None = None,
        poison: bool = False,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.backend = backend
        self.layout = strategy.layout
        # A resident holds a state at least, so the budget bounds the rows too.
        self.max_rows = max(1, min(max_rows, strategy.budget_bytes // strategy.spec.state_bytes))
        self.max_tokens = max_tokens
        self._max_entries = -(-strategy.request_limit() // self.layout.attention.tokens_per_entry)
        decode = [Shape(size) for size in graph_sizes(self.max_rows)]
        self._shapes = [*decode, *prefill_shapes(self.max_rows, max_tokens)]
        self.memory = self._plan_memory(graphs=capture is not None)
        """What this takes of the device at most."""
        self.memory.require(strategy.budget_bytes, model.device)
        self.pool = CachePool(self.layout, model.device, poison=poison)
        self.rows = RowTable(strategy, self.max_rows, self._max_entries)
        self.inputs = self._make_inputs()
        self.caches = backend.bind(self.pool.buffer, self.layout)
        self.graphs: StepGraphs | None = None
        if capture is not None:
            self.graphs = self._make_graphs(capture)
        self._places: dict[int, int] = {}
        """Where in the step launched last each request's sampled id is."""
        self._steady: _Steady | None = None

    def _plan_memory(self, graphs: bool) -> Memory:
        rows, tokens, vocabulary = self.max_rows, max(self.max_tokens, self.max_rows), self.model.config.vocab_size
        width = len(self.strategy.spec.state_layers) + self._max_entries
        itemsize = self.model.dtype.itemsize
        return Memory(
            weight_bytes=self.model.weight_bytes,
            cache_bytes=self.layout.pool_bytes,
            input_bytes=(2 if graphs else 1) * input_bytes(rows, self.max_tokens, width),
            logits_bytes=rows * vocabulary * itemsize if graphs else 0,
            graph_bytes=max(self.model.scratch_bytes(s.total_tokens, s.rows, s.prefill) for s in self._shapes)
            if graphs
            else 0,
            step_bytes=max(self.model.scratch_bytes(tokens, rows, rows), sampling_bytes(rows, vocabulary, itemsize)),
        )

    def _make_inputs(self) -> StepInputs:
        width = len(self.strategy.spec.state_layers)
        return StepInputs(self.max_rows, self.max_tokens, width, self._max_entries, self.pool.buffer.device)

    def _make_graphs(self, capture: Capture) -> StepGraphs:
        padding = self._make_inputs()
        size = (self.max_rows, self.model.config.vocab_size)
        self._logits = torch.empty(size, dtype=self.model.dtype, device=self.pool.buffer.device)
        return StepGraphs(
            self._shapes,
            lambda shape: self._compute(shape, self.inputs),
            lambda shape: self._compute(shape, padding),
            capture,
            self.backend.launches,
        )

    def _compute(self, shape: Shape, inputs: StepInputs) -> None:
        """A step from static memory to static memory."""
        with torch.inference_mode():
            logits_RV = self._forward(inputs.batch(shape, max_prefill_len=shape.tokens))
            self._logits[: shape.rows] = logits_RV
            self._greedy(logits_RV, inputs)

    def _greedy(self, logits_RV: torch.Tensor, inputs: StepInputs) -> None:
        """Each row's most likely token, kept for the next step and for the host."""
        count = logits_RV.shape[0]
        self.backend.greedy(logits_RV, inputs.sampled[:count], inputs.feed[:count])

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        return self.model.forward(batch, self.caches)

    def prepare(self) -> None:
        """Capture all graphs now, rather than each at its first use, and run the largest steps on padding: kernels are
        compiled, libraries initialised and the memory of steps is taken before the first request. Does nothing without
        graphs."""
        if self.graphs is not None:
            with torch.inference_mode(), self._on_device():
                self.graphs.capture()
                before = Counter(self.backend.launches)
                for rows in {1, self.max_rows}:
                    self._forward(padding_batch(rows, self.max_tokens, self.inputs.table))
                self.backend.launches.clear()
                self.backend.launches.update(before)

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels and graphs go to the current device: make it the pool's."""
        device = self.pool.buffer.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def relocate(self) -> None:
        """Execute the strategy's pending moves. Must precede every :meth:`launch` after memory was taken or returned."""
        moves = self.strategy.drain_moves()
        if moves:
            self.rows.moved()
            self.backend.block_copy(self.pool.buffer, [(move.src, move.dst, move.num_bytes) for move in moves])

    def launch(self, rows: Sequence[RowInput]) -> Flight:
        """Compute the rows' tokens and sample.

        The rows must be ordered decode first. At most one flight before this one may not have been waited for.
        """
        self._steady = None
        exact = shape_of(rows)
        graph = None if self.graphs is None else self.graphs.shape_for(*exact)
        shape, ids = graph or exact, [row.seq_id for row in rows]
        places, changed = self.rows.arrange(ids[: exact.decode], ids[exact.decode :], shape.decode)
        with torch.inference_mode(), self._on_device():
            if graph is None:
                logits_RV, slots = self._run(rows, places, changed, exact)
            else:
                logits_RV, slots = self._replay(rows, places, changed, graph), places
            self._sample(logits_RV, rows, slots)
            samples = [slot for slot, row in zip(slots, rows) if row.sampling is not None]
            self._places = dict(zip(ids, slots))
            result, event = self.inputs.fetch(logits_RV.shape[0])
            return Flight(result, samples, event)

    @property
    def can_repeat(self) -> bool:
        """Whether the step launched last was one that :meth:`repeat` can launch again."""
        return self._steady is not None

    def repeat(self) -> Flight:
        """What :meth:`launch` does where every row of the last step goes on with the token that it samples there: nothing but
        positions, and tables that gained entries, is new."""
        assert self._steady is not None
        assert self.graphs is not None
        shape, slots, position = self._steady
        changed, n = self.rows.again(), len(slots)
        with torch.inference_mode(), self._on_device():
            position += 1
            fill_again(self.inputs.begin(shape), position)
            self._put_rows(changed)
            self.inputs.send()
            self.graphs.replay(shape)
            result, event = self.inputs.fetch(n)
            return Flight(result, slots, event)

    def _sample(self, logits_RV: torch.Tensor, rows: Sequence[RowInput], slots: list[int]) -> None:
        """Replace the greedy ids of rows that are to be drawn."""
        if not any(row.sampling is not None and row.sampling.params.temperature > 0.0 for row in rows):
            return
        by_slot: list[SamplingRow | None] = [None] * logits_RV.shape[0]
        for slot, row in zip(slots, rows):
            if row.sampling is not None:
                by_slot[slot] = row.sampling
        sampled_R = self.inputs.sampled[: len(by_slot)]
        draw(logits_RV, by_slot, sampled_R)
        self.inputs.feed_sampled(len(by_slot))

    def _replay(self, rows: Sequence[RowInput], places: list[int], changed: list[int], shape: Shape) -> torch.Tensor:
        """A step as a graph. Every row has a place for its next token, whether it samples one or not."""
        assert self.graphs is not None
        fields = self.inputs.begin(shape)
        fill(fields, rows, places, shape, self._places, self.max_rows)
        self._put_rows(changed)
        self.inputs.send()
        self.graphs.replay(shape)
        if not shape.prefill and all(row.sampling is GREEDY for row in rows):
            self._steady = _Steady(shape, places, fields.position[: len(rows)].copy())
        return self._logits[: shape.rows if shape.prefill else len(rows)]

    def _run(
        self, rows: Sequence[RowInput], places: list[int], changed: list[int], shape: Shape
    ) -> tuple[torch.Tensor, list[int]]:
        """Any step, launched operation by operation, without padding."""
        fields = self.inputs.begin(shape)
        fill(fields, rows, places, shape, self._places, self.max_rows)
        count, slots = keep_sampling(fields, rows, places)
        self._put_rows(changed)
        self.inputs.send()
        batch = self.inputs.batch(
            shape,
            num_entries=max(1, *self.rows.num_entries[: shape.rows]),
            num_logits=count,
            max_prefill_len=max((row.num_tokens for row in rows[shape.decode :]), default=0),
            max_context_len=max(row.start + row.num_tokens for row in rows),
        )
        logits_RV = self._forward(batch)
        self._greedy(logits_RV, self.inputs)
        return logits_RV, slots

    def _put_rows(self, changed: list[int]) -> None:
        """Pack the rows that changed, no wider than what they hold and what the device may still hold of them."""
        if changed:
            width = self.rows.state_width + self.rows.sent_width(changed)
            self.inputs.put_rows(changed, self.rows.entries[:, :width])

    def forget(self, seq_id: int) -> None:
        """The request's memory is about to be returned."""
        self._steady = None
        self.rows.forget(seq_id)

    def reset(self) -> None:
        """After a launch that failed or was interrupted, at whatever point: nothing that the device was told counts."""
        self.rows.reset()
        self._steady = None
        if self.pool.buffer.device.type == "cuda":
            torch.cuda.synchronize(self.pool.buffer.device)

    def poison(self, seq_id: int) -> None:
        """Overwrite everything that a resident request holds with NaN patterns (tests, before its release)."""
        self.relocate()  # spans tell where the request is after the pending moves
        self.pool.poison(span for span in self.strategy.spans() if span.seq_id == seq_id)
