"""ModelRunner: packs a step's rows, runs them through the model and samples token ids.

:meth:`ModelRunner.launch` returns at once and the ids are fetched later: on CUDA nothing here waits for the device. A step
replays a CUDA graph where one holds it.

Shapes: T tokens of the step, B rows, R rows that sample.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hybridcache.engine.footprint import Memory
from hybridcache.engine.graphs import Capture, StepGraphs, graph_sizes, prefill_shapes
from hybridcache.engine.host_copies import HostCopies
from hybridcache.engine.inputs import StepInputs, input_bytes, keep_sampling, pack, pack_again, padding_batch
from hybridcache.engine.row_table import RowTable
from hybridcache.engine.sampling import GREEDY, SamplingRow, draw, sampling_bytes
from hybridcache.engine.step import Shape, Step
from hybridcache.kernels.backend import Backend, Caches
from hybridcache.kernels.batch import StepBatch
from hybridcache.memory.pool import CachePool
from hybridcache.memory.spans import Kind, Move
from hybridcache.prefix.placement import POSITION_MULTIPLE
from hybridcache.prefix.planned import checkpoint_table
from hybridcache.strategies.base import Strategy


class Model(Protocol):
    """The part of a model that the engine uses."""

    config: Any
    """The Transformers config; the engine reads ``vocab_size``."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def waits(self) -> str | None:
        """The reason why a forward pass waits for the device, so that no CUDA graph can hold it; None where it does not."""
        ...

    @property
    def weight_bytes(self) -> int: ...

    def scratch_bytes(self, tokens: int, rows: int, prefilling: int) -> int:
        """Most bytes that a forward pass of ``tokens`` tokens in ``rows`` rows holds at once, if all rows sample and
        ``prefilling`` of them prefill."""
        ...

    def forward(self, batch: StepBatch, caches: Caches) -> torch.Tensor:
        """Run the step; states and KV are read and written through ``caches`` only. Returns logits ``[R, vocabulary]`` of
        the tokens that ``batch.logit_index_R`` names, in the model's dtype or a wider one."""
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


class Packed(NamedTuple):
    """A packed step whose rows all decode greedily, kept so that the next one only advances positions."""

    shape: Shape
    """Shape of the graph to replay, or the step's own without graphs."""
    places: list[int]
    """Table row of each request, in the cohort's order."""
    position_B: np.ndarray
    """int64; last position, by table row."""


class ModelRunner:
    """Owns the pool and runs rows through the model.

    Args:
        model: see :class:`Model`.
        strategy: built with ``physical=True``; the scheduler has taken the memory that the rows need.
        backend: runs the cache operations.
        max_rows: most rows of a step.
        max_tokens: most tokens of a step.
        capture: records steps as graphs; None launches every step kernel by kernel.
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
        self.max_rows = max(1, strategy.step_rows(max_rows))
        self.max_tokens = max_tokens
        self._max_entries = -(-strategy.request_limit() // self.layout.attention.tokens_per_entry)
        decode = [Shape(size) for size in graph_sizes(self.max_rows)]
        self._shapes = [*decode, *prefill_shapes(self.max_rows, max_tokens)]
        self.memory = self._plan_memory(graphs=capture is not None)
        """The most that the runner takes of its device."""
        self.memory.require(strategy.budget_bytes, model.device)
        self.pool = CachePool(self.layout, model.device, poison=poison)
        self.caches = backend.bind(self.pool.buffer, self.layout)
        self.rows = RowTable(strategy, self.max_rows, self._max_entries)
        self.inputs = StepInputs(
            self.max_rows, max_tokens, self.rows.state_width, self._max_entries, self.pool.buffer.device
        )
        self.graphs: StepGraphs | None = None
        if capture is not None:
            self.graphs = self._make_graphs(capture)
        self.host: HostCopies | None = None
        """Copies to host memory and back; None where there is none."""
        self._sampled: dict[int, int] = {}
        """Place in ``feed`` of the token that the last launched step samples, by request."""

    def _plan_memory(self, graphs: bool) -> Memory:
        rows, tokens, vocabulary = self.max_rows, max(self.max_tokens, self.max_rows), self.model.config.vocab_size
        width = 2 * len(self.strategy.spec.state_layers) + self._max_entries
        itemsize = self.model.dtype.itemsize
        return Memory(
            weight_bytes=self.model.weight_bytes,
            cache_bytes=self.layout.pool_bytes,
            input_bytes=input_bytes(rows, self.max_tokens, width),
            logits_bytes=rows * vocabulary * itemsize if graphs else 0,
            graph_bytes=max(self.model.scratch_bytes(s.total_tokens, s.rows, s.prefill) for s in self._shapes)
            if graphs
            else 0,
            step_bytes=max(self.model.scratch_bytes(tokens, rows, rows), sampling_bytes(rows, vocabulary, itemsize)),
        )

    def _make_graphs(self, capture: Capture) -> StepGraphs:
        size = (self.max_rows, self.model.config.vocab_size)
        self._logits = torch.empty(size, dtype=self.model.dtype, device=self.pool.buffer.device)
        return StepGraphs(self._shapes, self._compute, self._warm_up, capture, self.backend.launches)

    def _compute(self, shape: Shape, table: torch.Tensor | None = None) -> None:
        """Run a step from static inputs to static logits and ids."""
        with torch.inference_mode():
            logits_RV = self._forward(self.inputs.batch(shape, max_prefill_len=shape.tokens, table=table))
            self._logits[: shape.rows] = logits_RV
            self._greedy(logits_RV)

    def _warm_up(self, shape: Shape) -> None:
        """Run a step of that shape on nothing but padding. Sampled ids stay as they are."""
        with self.inputs.all_padding(shape) as table:
            self._compute(shape, table)

    def _greedy(self, logits_RV: torch.Tensor) -> None:
        """Choose each row's most likely token, for the next step and for the host."""
        count = logits_RV.shape[0]
        self.backend.greedy(logits_RV, self.inputs.sampled[:count], self.inputs.feed[:count])

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        return self.model.forward(batch, self.caches)

    def prepare(self) -> None:
        """Capture all graphs now, not each at its first use, and run the largest steps on padding, so that kernels are
        compiled, libraries initialised and the memory of steps is taken before the first request. Without graphs this does
        nothing."""
        if self.graphs is not None:
            with torch.inference_mode(), self._on_device():
                self.graphs.capture()
                before = Counter(self.backend.launches)
                for rows in {1, self.max_rows}:
                    batch = padding_batch(rows, self.max_tokens, self.inputs.table)
                    self._forward(batch)
                shape = (len(batch.prefill_start_P), 1, len(self.strategy.spec.state_layers))
                batch.checkpoint_table_PNL = torch.full(shape, -1, dtype=torch.int32, device=self.pool.buffer.device)
                batch.checkpoint_interval = POSITION_MULTIPLE
                self._forward(batch)
                self._move(self.strategy.sample_moves())
                self.backend.launches.clear()
                self.backend.launches.update(before)

    def _on_device(self) -> AbstractContextManager[object]:
        """Make the pool's device the current one, to which kernels and graphs go."""
        device = self.pool.buffer.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def relocate(self) -> None:
        """Execute the strategy's pending moves. Must precede every :meth:`launch` after memory was taken or returned."""
        if self.host is not None:
            self.host.before_writing()
        moves = self.strategy.drain_moves()
        if moves:
            self.rows.moved()
            self._move(moves)

    def _move(self, moves: Sequence[Move]) -> None:
        self.backend.block_copy(self.pool.buffer, [(move.src, move.dst, move.num_bytes) for move in moves])

    def launch(self, step: Step) -> Flight:
        """Compute a step's tokens and sample. Its requests are :class:`~hybridcache.engine.request.Request`.

        At most one flight before this one may not have been waited for.
        """
        cohort = step.cohort
        with torch.inference_mode(), self._on_device():
            if cohort is not None and cohort.packed is not None:
                packed = cohort.packed
                slots, samples, count = self._launch_again(packed), packed.places, len(packed.places)
            else:
                slots, samples, count = self._launch_anew(step)
                self._sampled = {
                    item.seq.seq_id: slot for item, slot in zip(step.items, slots) if item.end == item.seq.num_known
                }
            result, event = self.inputs.fetch(count)
            return Flight(result, samples, event)

    def _launch_again(self, packed: Packed) -> list[int]:
        """Fast path of :meth:`_launch_anew` for a cohort: only positions and changed tables are sent."""
        shape, places, position_B = packed
        changed = self.rows.again()
        position_B += 1
        pack_again(self.inputs.begin(shape), position_B)
        self._put_rows(changed)
        self.inputs.send()
        if self.graphs is not None:
            self.graphs.replay(shape)
        else:
            self._run(shape, len(places), 0, int(position_B.max()) + 1)
        return places

    def _launch_anew(self, step: Step) -> tuple[list[int], list[int], int]:
        """Pack and launch a step. Returns the place of each item's id (meaningless where it samples none), the places of the
        items that sample, and the number of ids."""
        items, exact = step.items, step.shape
        kept = checkpoint_table(step.checkpoints, items[exact.decode :], self.strategy, exact.prefill)
        graph = None if self.graphs is None or kept is not None else self.graphs.shape_for(*exact)
        if graph is not None and self.graphs is not None:
            self.graphs.make(graph)
        shape, ids = graph or exact, [item.seq.seq_id for item in items]
        places, changed = self.rows.arrange(ids[: exact.decode], ids[exact.decode :], shape.decode)
        fields = self.inputs.begin(shape)
        pack(fields, items, places, shape, self._sampled, self.max_rows)
        requests: list[Any] = [item.seq if item.end == item.seq.num_known else None for item in items]
        sampling = [None if request is None else request.sampling() for request in requests]
        slots, count = places, shape.rows if shape.prefill else len(items)
        if graph is None:
            count, slots = keep_sampling(fields, [row is not None for row in sampling], places)
        self._put_rows(changed)
        self.inputs.send()
        if graph is not None and self.graphs is not None:
            self.graphs.replay(shape)
            logits_RV = self._logits[:count]
        else:
            longest = max((item.num_tokens for item in items[shape.decode :]), default=0)
            logits_RV = self._run(shape, count, longest, max(item.end for item in items), kept)
        self._draw(logits_RV, sampling, slots)
        if step.cohort is not None and all(row is GREEDY for row in sampling):
            step.cohort.packed = Packed(shape, places, fields.position[: len(items)].copy())
        return slots, [slot for slot, row in zip(slots, sampling) if row is not None], count

    def _run(
        self,
        shape: Shape,
        count: int,
        max_prefill_len: int,
        max_context_len: int,
        checkpoint_table_PNL: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Launch a step operation by operation, without padding."""
        batch = self.inputs.batch(
            shape,
            num_entries=max(1, *self.rows.num_entries[: shape.rows]),
            num_logits=count,
            max_prefill_len=max_prefill_len,
            max_context_len=max_context_len,
        )
        if checkpoint_table_PNL is not None:
            batch.checkpoint_table_PNL = torch.from_numpy(checkpoint_table_PNL).to(self.pool.buffer.device)
            batch.checkpoint_interval = POSITION_MULTIPLE
        logits_RV = self._forward(batch)
        self._greedy(logits_RV)
        return logits_RV

    def _draw(self, logits_RV: torch.Tensor, sampling: Sequence[SamplingRow | None], slots: list[int]) -> None:
        """Replace the greedy ids of rows that have a temperature."""
        if all(row is None or row is GREEDY for row in sampling):
            return
        by_slot: list[SamplingRow | None] = [None] * logits_RV.shape[0]
        for slot, row in zip(slots, sampling):
            if row is not None:
                by_slot[slot] = row
        draw(logits_RV, by_slot, self.inputs.sampled[: len(by_slot)])
        self.inputs.feed_sampled(len(by_slot))

    def _put_rows(self, changed: list[int]) -> None:
        """Pack the changed rows, as wide as the entries that they hold or that the device may still hold of them."""
        if changed:
            width = self.rows.first_kv + self.rows.sent_width(changed)
            self.inputs.put_rows(changed, self.rows.entries[:, :width])

    def forget(self, seq_id: int) -> None:
        """Forget a request whose memory is about to be returned."""
        self._sampled.pop(seq_id, None)
        self.rows.forget(seq_id)

    def reset(self) -> None:
        """Forget everything that was sent, after a launch that failed or was interrupted at whatever point."""
        self._sampled = {}
        self.rows.reset()
        if self.pool.buffer.device.type == "cuda":
            torch.cuda.synchronize(self.pool.buffer.device)

    def poison(self, seq_id: int) -> None:
        """Overwrite everything that only this resident request holds with NaN patterns (tests, before its release)."""
        self.relocate()  # spans tell where the request is after the pending moves
        self.pool.poison(
            span
            for span in self.strategy.spans()
            if span.seq_id == seq_id and span.owners == 1 and span.kind is not Kind.CACHED
        )
