"""Engine: takes requests and gives tokens, by continuous batching of one model over one strategy's memory."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy.typing as npt

from hybridcache.engine.failures import Failures
from hybridcache.engine.graphs import CHOICES, CudaCapture, wants_graphs
from hybridcache.engine.host_copies import HostCopies
from hybridcache.engine.request import Request, checked_prompt
from hybridcache.engine.runner import Flight, Model, ModelRunner
from hybridcache.engine.sampling import NOT_FINITE, SamplingParams
from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Status
from hybridcache.engine.step import Step
from hybridcache.engine.step_output import HostTimes, StepOutput
from hybridcache.errors import bad
from hybridcache.kernels.backend import Backend
from hybridcache.observe.metrics import Observation, Recorder
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.planned import check_positions
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.strategies.base import Strategy


class _Launched(NamedTuple):
    """A step on its way."""

    flight: Flight
    step: Step
    sampled: list[Request]
    """The step's requests that sample a token, in its order."""
    started_s: float
    """When its scheduling began."""
    seen: Observation | None
    """Memory while the step runs; None where nobody records."""


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
        prefix: which checkpoints are made and kept, so that later requests resume from them; None for those alone that
            requests ask for (``SamplingParams.checkpoint_at``).
        recorder: observes every step. Without overlap the clock stands still while it records (how long that takes depends
            on the strategy); with overlap the clock runs on, since the device works meanwhile.
        seed: seeds the requests that have no seed of their own.
        eos_token_ids: tokens that end a request unless it ignores them.
        cuda_graphs: whether steps run as CUDA graphs, captured here: ``true``, ``false``, or ``auto``, wherever they can.
        overlap: ``true``, ``false``, or ``auto``, which overlaps on CUDA.
        poison: fill the pool, and memory before its release, with NaN patterns (tests).
        max_retries: how often a request that failed alone is tried again.
        unproven_host_tier: allow ``prefix.host_bytes``, with which rare runs gave other tokens (docs/LOG.md).
        clock: seconds, monotonic.

    Raises:
        UserError: an option out of range, or cache and workspace do not fit the device.
    """

    def __init__(
        self, model: Model, strategy: Strategy, scheduler_config: SchedulerConfig | None, backend: Backend, *,
        prefix: PrefixPolicy | None = None, recorder: Recorder | None = None, seed: int = 0, eos_token_ids: Iterable[int] = (),
        cuda_graphs: str | bool = "auto", overlap: str | bool = "auto", poison: bool = False, max_retries: int = 1,
        unproven_host_tier: bool = False, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        if not 0 <= seed < 2**63:
            raise bad("seed", seed, "give a whole number from 0 to below 2**63")
        if str(overlap).lower() not in CHOICES:
            raise bad("overlap", overlap, f"choose {', '.join(CHOICES)}")
        if prefix is not None and prefix.host_bytes and not unproven_host_tier:
            raise bad("prefix.host_bytes", prefix.host_bytes, "host memory is for simulation: in inference give 0")
        self._failures = Failures(max_retries)
        on_cuda = model.device.type == "cuda"
        self.strategy = strategy
        self.backend = backend
        self.recorder = recorder
        self.overlap = on_cuda if overlap == "auto" else str(overlap).lower() == "true"
        self.prefix = PrefixCache(strategy, prefix, seed=seed, addressed=True)
        """What requests resume from."""
        self.scheduler = Scheduler(strategy, scheduler_config, before_release=self._before_release, prefix=self.prefix)
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
        if self.prefix.host is not None:
            store, pool = self.prefix.host.store, self.runner.pool
            self.runner.host = HostCopies(strategy, store, pool.buffer, self.runner.relocate)
            self.prefix.host.mover = self.runner.host
        self.memory = self.runner.memory
        """The most that the engine takes of its device."""
        self.seed = seed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.times = HostTimes()
        self._poison = poison
        self._vocabulary = model.config.vocab_size
        self._requests: dict[int, Request] = {}
        self._launched: _Launched | None = None
        self._next_id = 0
        self._clock = clock
        self._origin: float | None = None
        self._ended_s = 0.0
        """Time at which the last step ended."""

    def _before_release(self, seq_id: int) -> None:
        if self._poison:
            self.runner.poison(seq_id)
        self.runner.forget(seq_id)

    # -- requests --------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt_ids: npt.ArrayLike, params: SamplingParams | None = None, *, arrival_s: float | None = None
    ) -> Request:
        """Queue a request. Its waiting counts from ``arrival_s`` on the clock of :meth:`now`; None is this moment.

        Each of ``params.n`` outputs is a request of its own; they are ``siblings``, and the first is returned. One computes the
        prompt up to its last token; the others share its KV, read its states and go on from there, or wait for memory.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, or more tokens than the pool can ever hold.
        """
        params = params or SamplingParams()
        prompt = checked_prompt(prompt_ids, self._vocabulary)
        check_positions(params.checkpoint_at, len(prompt))
        self.prefix.on |= bool(params.checkpoint_at) or params.n > 1
        arrived = self.now() if arrival_s is None else arrival_s
        siblings = Request.outputs_of(
            self._next_id, prompt, params, seed=self.seed, eos_token_ids=self.eos_token_ids, arrival_s=arrived
        )
        for request in siblings:
            self.scheduler.submit(request)
            self._requests[request.seq_id] = request
        self._next_id += 1
        return siblings[0]

    def abort(self, seq_id: int) -> None:
        """End a request and its siblings now, and free their memory at once. Those that have finished stay as they are.

        Raises:
            UserError: no request of that id is known.
        """
        request = self._request(seq_id)
        for one in request.siblings or (request,):
            self.scheduler.abort(one, self.now())

    def forget(self, seq_id: int) -> None:
        """Drop the engine's record of a finished request. Raises UserError where it has not finished, or is not known."""
        if self._request(seq_id).status is not Status.FINISHED:
            raise bad("seq_id", seq_id, "has not finished; abort it first")
        del self._requests[seq_id]

    def knows(self, seq_id: int) -> bool:
        """Whether a request was added and not forgotten."""
        return seq_id in self._requests

    def sequence(self, seq_id: int) -> Request:
        """A request that was added and not forgotten."""
        return self._request(seq_id)

    def error(self, seq_id: int) -> str | None:
        """The reason why a request ended with ``error``; None where it did not."""
        return self._request(seq_id).error

    def _request(self, seq_id: int) -> Request:
        try:
            return self._requests[seq_id]
        except KeyError:
            raise bad("seq_id", seq_id, "is no request of this engine") from None

    @property
    def sequences(self) -> list[Request]:
        """All requests that were added and not forgotten, in order of arrival at the engine."""
        return list(self._requests.values())

    @property
    def failed_steps(self) -> int:
        """Forward passes that raised."""
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
        """Schedule and launch a step, then settle it; with overlap, settle the step before it instead.

        Whatever is raised here, an interrupt at any line too, leaves all requests that have not ended waiting, to be recomputed
        from their tokens, and the memory empty. The tokens that had arrived are in ``output_ids``.
        """
        try:
            started = self._clock()
            output = self._step()
            self.times.steps += 1
            self.times.total_s += self._clock() - started
            return output
        except BaseException:
            self._abandon()
            raise

    def _step(self) -> StepOutput:
        started, output = self.now(), StepOutput()
        before, self._launched = self._launched, None
        self.prefix.now_s = started
        if self.prefix.host is not None:
            self.prefix.host.tend()
        step = self.scheduler.schedule()
        if not step and before is None and self.prefix.host is not None:
            self.prefix.host.wait()
        if self._failures.steps and len(groups := self._failures.groups(step)) > 1:
            self._settle(before, output)
            self._step_apart(groups, started, output)
        elif step and not self._relocate():
            self._settle(before, output)
            self._requeue_everybody(step)
        else:
            launched = self._launch(step, started) if step else None
            if not self._settle(before, output) and launched is not None:
                # The step before failed: what it left is void, and so is this step, which reads that.
                self.scheduler.void(launched.step)
                self.scheduler.requeue(launched.step.seqs)
                launched = None
            if self._failures.unjudged or not self.overlap:
                self._settle(launched, output)
                launched = None
            self._launched = launched
        if self._failures.unjudged:
            self._answer_for_failures(output)
        return output

    def _step_apart(self, groups: list[Step], started: float, output: StepOutput) -> None:
        """Run each group in a batch of its own and wait for it, so that a failure names one request."""
        if not self._relocate():
            self._requeue_everybody(*groups)
            return
        for group in groups:
            self._settle(self._launch(group, started), output)

    def _requeue_everybody(self, *steps: Step) -> None:
        """These steps are not launched: memory that was to be moved may be lost."""
        for step in steps:
            self.scheduler.void(step)
        self.scheduler.requeue([*self.scheduler.running, *self.scheduler.ending])

    def _relocate(self) -> bool:
        """Execute pending moves. False where they failed: any request may have lost bytes, so the caller recomputes all."""
        try:
            self.runner.relocate()
        except Exception as error:
            self._failures.not_moved(error)
            return False
        self._failures.relocations = 0
        return True

    def _launch(self, step: Step, started: float) -> _Launched | None:
        """Launch a batch and count its tokens as known. None where the launch failed or nobody in the batch still runs."""
        if not self.scheduler.runs_again(step):
            items = [item for item in step.items if item.seq.status is Status.RUNNING]
            if len(items) < len(step.items):
                self.scheduler.void(step.only([item for item in step.items if item.seq.status is not Status.RUNNING]))
                step = step.only(items)
            if not items:
                return None
        seen = None
        if self.recorder is not None:
            with self._off_the_clock():
                running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
                seen = self.recorder.observe(started, self.strategy, running, waiting)
        try:
            flight = self.runner.launch(step)
            if not self.overlap:
                self._wait(flight)
        except Exception as error:  # whatever a kernel raises, the other requests must go on
            self._failures.add(step.items, error)
            self.scheduler.void(step)
            self.runner.reset()
            self._record(started, seen)
            return None
        sampled: list[Any] = self.scheduler.advance(step)
        return _Launched(flight, step, sampled, started, seen)

    def _settle(self, launched: _Launched | None, output: StepOutput) -> bool:
        """Wait for a step, append its tokens and end the requests that they end. False where the step had failed."""
        if launched is None:
            return True
        try:
            tokens = self._wait(launched.flight)
        except Exception as error:
            self._failures.add(launched.step.items, error)
            self.scheduler.void(launched.step)
            return False
        finally:
            self._record(launched.started_s, launched.seen)
        now, sampled, cohort = self.now(), launched.sampled, launched.step.cohort
        if min(tokens, default=0) < 0:
            self._end_not_finite(launched, tokens, now, output)
        output.new_tokens.update(zip(cohort.ids if cohort is not None else [seq.seq_id for seq in sampled], tokens))
        for seq in sampled:
            if seq.status is Status.FINISHED:  # it ended while this step was on its way
                output.new_tokens.pop(seq.seq_id)
        stopping = None if cohort is None else cohort.stopping
        if stopping is None:
            stopping = [(i, seq.stop_ids) for i, seq in enumerate(sampled) if seq.stop_ids]
            if cohort is not None:
                cohort.stopping = stopping
        stopped = {sampled[i].seq_id for i, stop_ids in stopping if tokens[i] in stop_ids}
        output.finished += self.scheduler.settle(sampled, now, stopped, tokens)
        return True

    def _end_not_finite(self, launched: _Launched, tokens: list[int], now: float, output: StepOutput) -> None:
        for seq, token in zip(launched.sampled, tokens):
            if token == NOT_FINITE and seq.status is not Status.FINISHED:
                seq.error = f"logits after position {seq.prompt_len + seq.num_settled - 1} are not finite"
                self.scheduler.abort(seq, now, "error")
                output.finished.append(seq)

    def _wait(self, flight: Flight) -> list[int]:
        before = self._clock()
        try:
            return flight.wait()
        finally:
            self.times.wait_s += self._clock() - before

    def _answer_for_failures(self, output: StepOutput) -> None:
        """Requeue the requests of failed batches, and end those that failed alone too often."""
        again, ended = self._failures.judge()
        for seq in ended:
            self.scheduler.abort(seq, self.now(), "error")
        output.finished += ended
        self.scheduler.requeue(again)

    def _abandon(self) -> None:
        """Forget the step on its way and let every request that has not ended wait for recomputation."""
        self._launched = None
        self._failures.forget()
        self.runner.reset()
        now = self.now()
        for request in self._requests.values():
            request.end_if_complete(now)
        self.scheduler.restart(self._requests.values())

    def _record(self, started_s: float, seen: Observation | None) -> None:
        """Record a step that has ended. Its duration runs from the start of its scheduling, or from the end of the step before
        where that is later: until then the device worked on that one."""
        now = self.now()
        begin = max(started_s, self._ended_s)
        self._ended_s = now
        if self.recorder is not None and seen is not None:
            with self._off_the_clock():
                self.recorder.add(seen, now - begin)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Stop the clock while recording without overlap: the device waits, and how long depends on the strategy."""
        before = self._clock()
        yield
        if not self.overlap:
            assert self._origin is not None
            self._origin += self._clock() - before
