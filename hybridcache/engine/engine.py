"""Engine: requests in, tokens out. Continuous batching of one model over one strategy's memory."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy.typing as npt

from hybridcache.engine.failures import Failures
from hybridcache.engine.graphs import CHOICES, CudaCapture, wants_graphs
from hybridcache.engine.packing import RowInput
from hybridcache.engine.request import Request, checked_prompt
from hybridcache.engine.runner import Flight, Model, ModelRunner
from hybridcache.engine.sampling import NOT_FINITE, SamplingParams
from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import ScheduledTokens, Step
from hybridcache.engine.step_output import HostTimes, StepOutput
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend
from hybridcache.observe.metrics import Recorder
from hybridcache.strategies.base import Strategy


class _Launched(NamedTuple):
    """A step on its way."""

    flight: Flight
    step: Step
    seqs: list[Sequence]
    """Of the step's items."""
    sampled: list[Sequence]
    """Those that sample a token, in their order."""
    ids: list[int]
    """Of ``sampled``."""
    stopping: list[tuple[int, frozenset[int]]]
    """Places in ``sampled`` of those that a token can end, and which tokens."""


class Engine:
    """Runs requests until they end.

    With ``overlap`` the next step is scheduled and launched before the tokens of the last one are looked at. The scheduler
    counts on a token for every request that samples; which one it is, only the device knows at that time. A request's last
    token by number is known to be the last. One that ends by a stop token is found out a step late: the token that it was
    given meanwhile is dropped, and tokens are the same as without overlap.

    A step that raises is undone: states are updated in place, so every request in it drops its memory and is recomputed
    from its tokens, first alone, to tell which one fails. One that keeps failing alone ends with ``finish_reason``
    ``error``; the others go on. Logits that are not finite end their request at once.

    Args:
        model: see :class:`~hybridcache.engine.runner.Model`.
        strategy: built with ``physical=True``.
        scheduler_config: policies; None for the defaults.
        backend: runs the cache operations.
        recorder: observes every step. Without overlap the time it takes is not counted (it depends on the strategy); with
            overlap it is, for the device works meanwhile.
        seed: of requests that have none of their own.
        eos_token_ids: tokens that end a request unless it ignores them.
        cuda_graphs: decode under CUDA graphs, captured at once: ``true``, ``false``, or ``auto``: wherever it can be.
        overlap: ``true``, ``false``, or ``auto``: on CUDA.
        poison: fill the pool, and memory before its release, with NaN patterns (tests).
        max_retries: how often a request that failed alone is tried again.
        clock: seconds, monotonic.

    Raises:
        UserError: an option out of range, or cache and workspace do not fit the device.
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
        cuda_graphs: str | bool = "auto",
        overlap: str | bool = "auto",
        poison: bool = False,
        max_retries: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise bad("seed", seed, "give a whole number from 0 to below 2**63")
        if str(overlap).lower() not in CHOICES:
            raise bad("overlap", overlap, f"choose {', '.join(CHOICES)}")
        self._failures = Failures(max_retries)
        on_cuda = model.device.type == "cuda"
        self.strategy = strategy
        self.backend = backend
        self.recorder = recorder
        self.overlap = on_cuda if overlap == "auto" else str(overlap).lower() == "true"
        self.scheduler = Scheduler(strategy, scheduler_config, before_release=self._before_release)
        self.runner = ModelRunner(
            model,
            strategy,
            backend,
            max_rows=self.scheduler.config.max_running,
            max_tokens=self.scheduler.config.max_tokens_per_step,
            capture=CudaCapture() if wants_graphs(cuda_graphs, backend, model.device, model.waits) else None,
            poison=poison,
        )
        self.runner.prepare()
        self.memory = self.runner.memory
        """What this takes of its device at most."""
        self.seed = seed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.times = HostTimes()
        self._poison = poison
        self._vocabulary = model.config.vocab_size
        self._requests: dict[int, Request] = {}
        self._launched: _Launched | None = None
        self._last: _Launched | None = None
        """The step launched last, whether or not it is still on its way."""
        self._next_id = 0
        self._clock = clock
        self._origin: float | None = None
        self._recorded = 0.0

    def _before_release(self, seq_id: int) -> None:
        if self._poison:
            self.runner.poison(seq_id)
        self.runner.forget(seq_id)

    # -- requests --------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt_ids: npt.ArrayLike, params: SamplingParams | None = None, *, arrival_s: float | None = None
    ) -> Sequence:
        """Queue a request. ``arrival_s`` (of :meth:`now`) counts its waiting from an earlier moment; None is now.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, or more tokens than the pool can ever hold.
        """
        params = params or SamplingParams()
        prompt = checked_prompt(prompt_ids, self._vocabulary)
        seq = Sequence(
            seq_id=self._next_id,
            prompt_len=len(prompt),
            max_tokens=params.max_tokens,
            arrival_s=self.now() if arrival_s is None else arrival_s,
        )
        self.scheduler.submit(seq)
        self._next_id += 1
        self._requests[seq.seq_id] = Request.of(seq, prompt, params, self.seed, self.eos_token_ids)
        return seq

    def abort(self, seq_id: int) -> None:
        """End a request now; its memory is free at once. A finished one stays as it is.

        Raises:
            UserError: no request of that id is known.
        """
        self.scheduler.abort(self._request(seq_id).seq, self.now())

    def forget(self, seq_id: int) -> None:
        """Drop what is kept of a finished request.

        Raises:
            UserError: it has not finished, or is not known.
        """
        if self._request(seq_id).seq.status is not Status.FINISHED:
            raise bad("seq_id", seq_id, "has not finished; abort it first")
        del self._requests[seq_id]

    def knows(self, seq_id: int) -> bool:
        """Whether a request was added and not forgotten."""
        return seq_id in self._requests

    def sequence(self, seq_id: int) -> Sequence:
        """A request that was added and not forgotten."""
        return self._request(seq_id).seq

    def error(self, seq_id: int) -> str | None:
        """Why a request ended with ``error``; None where it did not."""
        return self._request(seq_id).error

    def _request(self, seq_id: int) -> Request:
        try:
            return self._requests[seq_id]
        except KeyError:
            raise bad("seq_id", seq_id, "is no request of this engine") from None

    @property
    def sequences(self) -> list[Sequence]:
        """All requests that were added and not forgotten, in order of arrival at the engine."""
        return [request.seq for request in self._requests.values()]

    @property
    def failed_steps(self) -> int:
        """Forward passes that raised, since construction."""
        return self._failures.steps

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return self.scheduler.has_work or bool(self.scheduler.ending)

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
        """Schedule and launch a step, and account for it; with overlap, for the one before it instead.

        Whatever is raised here, an interrupt too, leaves all requests that have not ended waiting, to be recomputed from their
        tokens.
        """
        started = self._clock()
        try:
            output = self._step()
        except BaseException:
            self._abandon()
            raise
        self.times.steps += 1
        self.times.total_s += self._clock() - started
        return output

    def _step(self) -> StepOutput:
        started, output, failures = self.now(), StepOutput(), self._failures
        before, self._launched = self._launched, None
        since = started if before is None else self._recorded
        step = self.scheduler.schedule()
        groups = failures.groups(step, self._requests)
        if len(groups) > 1 or not self.overlap:
            # One at a time, each with all tokens known.
            self._settle(before, output)
            before = None
        unmoved = self._relocate() if groups else None
        launched = None
        for group in groups if unmoved is None else ():
            self._settle(launched, output)
            launched = self._launch(group, since if group is groups[-1] else None)
        if not self._settle(before, output) and launched is not None:
            # What the step before left is void, and with it what this one makes of it.
            self.scheduler.requeue(launched.seqs)
            launched = None
        if unmoved is not None:
            failures.not_moved(unmoved)
            self.scheduler.requeue([*self.scheduler.running, *self.scheduler.ending])
        if failures or not self.overlap or len(groups) > 1:
            self._settle(launched, output)
            launched = None
        if failures:
            self._answer_for_failures(output)
        self._launched = launched
        return output

    def _relocate(self) -> Exception | None:
        """Execute pending moves."""
        try:
            self.runner.relocate()
        except Exception as error:
            return error
        self._failures.moved()
        return None

    def _launch(self, step: Step, since: float | None) -> _Launched | None:
        """Launch a batch and count its tokens as known. None where that failed, or nobody in it is running any more. The
        memory is observed for the time since ``since``, where that is given."""
        seqs = self.scheduler.decoding(step)
        if seqs is None:
            items = [item for item in step.items if item.seq.status is Status.RUNNING]
            if not items:
                return None
            seqs = [item.seq for item in items]
            step = step if len(items) == len(step.items) else Step(items)
        last = self._last
        try:
            if last is not None and last.seqs == seqs and self.runner.can_repeat:
                flight = self.runner.repeat()
            else:
                flight = self.runner.launch([self._row(item) for item in step.items])
            if not self.overlap:
                self._wait(flight)
        except Exception as error:  # whatever a kernel raises, the other requests must go on
            self._failures.add(step.items, error)
            self.runner.reset()
            return None
        finally:
            if self.recorder is not None and since is not None:
                self._record(self.recorder, since)
        sampled = self.scheduler.advance(step)
        if last is not None and last.sampled == sampled:
            ids, stopping = last.ids, last.stopping
        else:
            ids = [seq.seq_id for seq in sampled]
            stop_ids = (self._requests[seq_id].stop_ids for seq_id in ids)
            stopping = [(i, tokens) for i, tokens in enumerate(stop_ids) if tokens]
        self._last = _Launched(flight, step, seqs, sampled, ids, stopping)
        return self._last

    def _row(self, item: ScheduledTokens) -> RowInput:
        seq, start, count = item
        request = self._requests[seq.seq_id]
        known = seq.prompt_len + seq.num_output
        end = start + count
        tokens = request.tokens(start, end) if end <= seq.prompt_len + seq.num_settled else None
        return RowInput(seq.seq_id, start, count, tokens, request.sampling() if end == known else None)

    def _settle(self, launched: _Launched | None, output: StepOutput) -> bool:
        """Wait for a step, append its tokens and end what they end. False where the step turned out to have failed."""
        if launched is None:
            return True
        try:
            tokens = self._wait(launched.flight)
        except Exception as error:
            self._failures.add(launched.step.items, error)
            return False
        now, sampled = self.now(), launched.sampled
        if min(tokens, default=0) < 0:
            self._end_not_finite(launched, tokens, now, output)
        output.new_tokens.update(zip(launched.ids, tokens))
        for seq in sampled:
            if seq.status is Status.FINISHED:  # it ended while this step was on its way
                output.new_tokens.pop(seq.seq_id)
        stopped = {sampled[i].seq_id for i, stop_ids in launched.stopping if tokens[i] in stop_ids}
        output.finished += self.scheduler.settle(sampled, now, stopped, tokens)
        return True

    def _end_not_finite(self, launched: _Launched, tokens: list[int], now: float, output: StepOutput) -> None:
        for seq, token in zip(launched.sampled, tokens):
            if token == NOT_FINITE and seq.status is not Status.FINISHED:
                last = seq.prompt_len + seq.num_settled - 1
                self._requests[seq.seq_id].error = f"logits after position {last} are not finite"
                self.scheduler.abort(seq, now, "error")
                output.finished.append(seq)

    def _wait(self, flight: Flight) -> list[int]:
        before = self._clock()
        try:
            return flight.wait()
        finally:
            self.times.wait_s += self._clock() - before

    def _answer_for_failures(self, output: StepOutput) -> None:
        """Send the requests of failed batches back to be recomputed; end those that failed alone too often."""
        again, ended = self._failures.judge(self._requests)
        for seq in ended:
            self.scheduler.abort(seq, self.now(), "error")
        output.finished += ended
        self.scheduler.requeue(again)

    def _abandon(self) -> None:
        """Forget what is on its way, and recompute every request that has not ended."""
        self._launched = None
        self._failures.forget()
        self.runner.reset()
        self.scheduler.requeue([*self.scheduler.running, *self.scheduler.ending, *self.scheduler.waiting])

    def _record(self, recorder: Recorder, since: float) -> None:
        """Observe the memory that a step runs in, for the time since ``since``."""
        now, before = self.now(), self._clock()
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        recorder.step(since, now - since, self.strategy, running, waiting)
        if not self.overlap:
            assert self._origin is not None
            self._origin += self._clock() - before
        self._recorded = now
