"""Engine: requests in, tokens out. Continuous batching of one model over one strategy's memory."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybridcache.engine.runner import Model, ModelRunner, RowInput
from hybridcache.engine.sampling import NOT_FINITE, SamplingParams, SamplingRow, request_key
from hybridcache.engine.scheduler import ScheduledTokens, Scheduler, SchedulerConfig, Step
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend
from hybridcache.metrics import Recorder
from hybridcache.strategies.base import Strategy

_LOG = logging.getLogger(__name__)


@dataclass
class StepOutput:
    """What one step gave: the new token of every request that sampled, and the requests that ended."""

    new_tokens: dict[int, int] = field(default_factory=dict)
    finished: list[Sequence] = field(default_factory=list)


@dataclass
class _Live:
    """What the engine knows of a request beyond its :class:`~hybridcache.engine.sequence.Sequence`."""

    seq: Sequence
    params: SamplingParams
    key: tuple[int, int]
    stop_ids: frozenset[int]
    tokens: np.ndarray
    """int64; prompt, then sampled tokens; the first ``seq.num_known`` are valid."""
    error: str | None = None
    failures_together: int = 0
    failures_alone: int = 0
    alone_until: float = 0
    """Positions below this are computed in a batch of its own: a step of several requests failed there."""


class Engine:
    """Runs requests until they end.

    A step that raises is undone: states are updated in place, so every request in it drops its memory and is recomputed
    from its tokens, first alone, to tell which one fails. One that keeps failing alone ends with ``finish_reason``
    ``error``; the others go on. Logits that are not finite end their request at once.

    Args:
        model: see :class:`~hybridcache.engine.runner.Model`.
        strategy: built with ``physical=True``.
        scheduler_config: policies; None for the defaults.
        backend: runs the cache operations.
        recorder: observes every step; the time it takes is not counted (it depends on the strategy).
        seed: of requests that have none of their own.
        eos_token_ids: tokens that end a request unless it ignores them.
        poison: fill the pool, and memory before its release, with NaN patterns (tests).
        max_retries: how often a request that failed alone is tried again.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: Model,
        strategy: Strategy,
        scheduler_config: SchedulerConfig | None,
        backend: Backend,
        *,
        recorder: Recorder | None = None,
        seed: int = 0,
        eos_token_ids: Iterable[int] = (),
        poison: bool = False,
        max_retries: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if max_retries < 0:
            raise bad("max_retries", max_retries, "give 0 or more")
        if not 0 <= seed < 2**63:
            raise bad("seed", seed, "give a whole number from 0 to below 2**63")
        self.strategy = strategy
        self.backend = backend
        self.recorder = recorder
        self.runner = ModelRunner(model, strategy, backend, poison=poison)
        self.scheduler = Scheduler(strategy, scheduler_config, before_release=self.runner.poison if poison else None)
        self.seed = seed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_retries = max_retries
        self.failed_steps = 0
        """Forward passes that raised, since construction."""
        self._failed_relocations = 0
        self._vocabulary = model.config.vocab_size
        self._requests: dict[int, _Live] = {}
        self._next_id = 0
        self._clock = clock
        self._origin: float | None = None

    # -- requests --------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt_ids: npt.ArrayLike, params: SamplingParams | None = None, *, arrival_s: float | None = None
    ) -> Sequence:
        """Queue a request. ``arrival_s`` (of :meth:`now`) counts its waiting from an earlier moment; None is now.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, or more tokens than the pool can ever hold.
        """
        params = params or SamplingParams()
        prompt = self._checked_prompt(prompt_ids)
        seq = Sequence(
            seq_id=self._next_id,
            prompt_len=len(prompt),
            max_tokens=params.max_tokens,
            arrival_s=self.now() if arrival_s is None else arrival_s,
        )
        self.scheduler.submit(seq)
        self._next_id += 1
        tokens = np.empty(len(prompt) + params.max_tokens, dtype=np.int64)
        tokens[: len(prompt)] = prompt
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        key = request_key(params, self.seed, seq.seq_id)
        self._requests[seq.seq_id] = _Live(seq, params, key, stop_ids, tokens)
        return seq

    def _checked_prompt(self, prompt_ids: npt.ArrayLike) -> np.ndarray:
        try:
            prompt = np.asarray(prompt_ids)
        except ValueError:  # numpy's word for a ragged list
            raise bad("prompt_ids", prompt_ids, "give token ids as a flat list") from None
        if prompt.ndim != 1 or prompt.size == 0:
            raise bad("prompt_ids", prompt_ids, "give at least one token id, as a flat list")
        if not np.issubdtype(prompt.dtype, np.integer):
            raise bad("prompt_ids", f"{prompt.dtype} values", "give whole numbers")
        outside = np.flatnonzero((prompt < 0) | (prompt >= self._vocabulary))
        if outside.size:
            first = int(outside[0])
            raise bad(
                f"prompt_ids[{first}]",
                int(prompt[first]),
                f"outside the model's vocabulary of {self._vocabulary} ids (0 to {self._vocabulary - 1})",
            )
        return prompt

    def abort(self, seq_id: int) -> None:
        """End a request now; its memory is free at once. A finished one stays as it is.

        Raises:
            UserError: no request of that id is known.
        """
        self.scheduler.abort(self._live(seq_id).seq, self.now())

    def forget(self, seq_id: int) -> None:
        """Drop what is kept of a finished request.

        Raises:
            UserError: it has not finished, or is not known.
        """
        if self._live(seq_id).seq.status is not Status.FINISHED:
            raise bad("seq_id", seq_id, "has not finished; abort it first")
        del self._requests[seq_id]

    def sequence(self, seq_id: int) -> Sequence:
        """A request that was added and not forgotten."""
        return self._live(seq_id).seq

    def error(self, seq_id: int) -> str | None:
        """Why a request ended with ``error``; None where it did not."""
        return self._live(seq_id).error

    def _live(self, seq_id: int) -> _Live:
        try:
            return self._requests[seq_id]
        except KeyError:
            raise bad("seq_id", seq_id, "is no request of this engine") from None

    @property
    def sequences(self) -> list[Sequence]:
        """All requests that were added and not forgotten, in order of arrival at the engine."""
        return [live.seq for live in self._requests.values()]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def now(self) -> float:
        """Seconds since the first request, without the time spent recording."""
        if self._origin is None:
            self._origin = self._clock()
        return self._clock() - self._origin

    # -- steps -----------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[StepOutput], None] | None = None) -> float:
        """Step until every request has ended. Returns the seconds it took, without the time spent recording."""
        started = self.now()
        while self.has_work:
            output = self.step()
            if on_step is not None:
                on_step(output)
        return self.now() - started

    def step(self) -> StepOutput:
        """Schedule, run and account for one step."""
        started = self.now()
        step = self.scheduler.schedule()
        output = StepOutput()
        if not step.items or not self._relocate():
            return output
        done: list[ScheduledTokens] = []
        failed: list[tuple[list[ScheduledTokens], Exception]] = []
        for group in self._groups(step):
            try:
                sampled = self.runner.run([self._row(item) for item in group])
            except Exception as error:  # whatever a kernel raises, the other requests must go on
                failed.append((group, error))
            else:
                output.new_tokens |= zip((item.seq.seq_id for item in group if item.samples), sampled)
                done += group
        now = self.now()
        if self.recorder is not None:
            self._record(started, now)
        self._fail(failed, now, output)
        self._complete(done, now, output)
        return output

    def _relocate(self) -> bool:
        """Execute pending moves. If that fails, any request's bytes may be lost: all are recomputed."""
        try:
            self.runner.relocate()
        except Exception:
            self._failed_relocations += 1
            if self._failed_relocations > self.max_retries:
                raise
            _LOG.warning("moving memory failed; all running requests are recomputed", exc_info=True)
            self.scheduler.requeue(list(self.scheduler.running))
            return False
        self._failed_relocations = 0
        return True

    def _groups(self, step: Step) -> list[list[ScheduledTokens]]:
        """The step's items in batches: one for all, and one each for those under suspicion."""
        if not self.failed_steps:
            return [step.items]
        alone = [item for item in step.items if item.start < self._requests[item.seq.seq_id].alone_until]
        together = [item for item in step.items if item not in alone] if alone else step.items
        return ([together] if together else []) + [[item] for item in alone]

    def _row(self, item: ScheduledTokens) -> RowInput:
        seq = item.seq
        live = self._requests[seq.seq_id]
        sampling = SamplingRow(live.params, live.key, seq.num_output) if item.samples else None
        return RowInput(seq.seq_id, item.start, live.tokens[item.start : item.end], sampling)

    def _complete(self, items: list[ScheduledTokens], now: float, output: StepOutput) -> None:
        """Append the sampled tokens and end what they end."""
        stopped = set()
        for item in items:
            seq = item.seq
            if not item.samples:
                continue
            live, token = self._requests[seq.seq_id], output.new_tokens[seq.seq_id]
            if token == NOT_FINITE:
                del output.new_tokens[seq.seq_id]
                live.error = f"logits after position {item.end - 1} are not finite"
                self.scheduler.abort(seq, now, "error")
                output.finished.append(seq)
                continue
            live.tokens[seq.num_known] = token
            seq.output_ids.append(token)
            if token in live.stop_ids:
                stopped.add(seq.seq_id)
        alive = [item for item in items if item.seq.status is Status.RUNNING]
        output.finished += self.scheduler.complete(Step(alive), now, stopped)

    def _fail(self, failed: list[tuple[list[ScheduledTokens], Exception]], now: float, output: StepOutput) -> None:
        """Send the requests of failed batches back to be recomputed; end those that failed alone too often."""
        again = []
        for group, error in failed:
            self.failed_steps += 1
            _LOG.warning("a step of %d request(s) failed; they are recomputed or end", len(group), exc_info=error)
            for item in group:
                live = self._requests[item.seq.seq_id]
                if len(group) == 1:
                    live.failures_alone += 1
                    live.alone_until = max(live.alone_until, item.end)
                else:
                    live.failures_together += 1
                    # One that fails in company time and again, yet never alone, stays alone.
                    live.alone_until = item.end if live.failures_together <= self.max_retries else math.inf
                if live.failures_alone > self.max_retries:
                    live.error = f"{type(error).__name__}: {error}"
                    self.scheduler.abort(item.seq, now, "error")
                    output.finished.append(item.seq)
                else:
                    again.append(item.seq)
        self.scheduler.requeue(again)

    def _record(self, started: float, now: float) -> None:
        """Observe the memory that the step ran in, off the clock."""
        assert self.recorder is not None
        assert self._origin is not None
        before = self._clock()
        self.recorder.step(
            started, now - started, self.strategy, len(self.scheduler.running), len(self.scheduler.waiting)
        )
        self._origin += self._clock() - before
