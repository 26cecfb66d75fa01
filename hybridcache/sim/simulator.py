"""simulate: a request stream through the real scheduler and a real strategy, on a clock that a cost model advances."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import numpy as np

from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Sequence
from hybridcache.engine.step import Step
from hybridcache.errors import bad
from hybridcache.observe.metrics import Recorder
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.host_store import HostCopy
from hybridcache.sim.cost_model import CostModel
from hybridcache.strategies.base import Strategy
from hybridcache.workloads.base import Request, Stream, UniqueIds


@dataclass(eq=False, slots=True)
class SimulatedSequence(Sequence):
    """A request in simulation, whose token ids are known beforehand."""

    request: Request | None = None
    """None once it has ended, so that a long run does not hold the ids of all its requests."""
    unique: UniqueIds | None = None
    ids: np.ndarray | None = None

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Ids ``start .. end - 1`` of prompt and output (int32), made at the first call. Output ids that the stream does not
        tell occur once in the run.

        Raises:
            UserError: the stream gives no ids.
        """
        if self.ids is None:
            request = self.request
            if request is None or request.prompt_ids is None:
                raise bad(
                    "prompt_ids", None, f"request {self.seq_id} has no token ids (any more); give the stream its ids"
                )
            assert self.unique is not None
            said = self.unique.take(self.max_tokens) if request.output_ids is None else request.output_ids
            self.ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in (request.prompt_ids, said)])
        return self.ids[start:end]


@dataclass(frozen=True)
class SimulationResult:
    """What a simulated run did."""

    sequences: list[Sequence]
    """All requests that ran, finished, in order of arrival; those refused are not among them."""
    duration_s: float
    """From the first arrival of a request that ran to the end of the last step; 0 where none ran."""
    steps: int
    refused_requests: tuple[Request, ...]
    """Requests that the strategy's budget can never hold (``Strategy.request_limit``); they never entered the queue. In a
    closed loop their session ends with them."""

    @property
    def refused(self) -> int:
        """How many requests were refused. Strategies that refuse differently do unequal work: compare them on requests that
        all of them hold."""
        return len(self.refused_requests)


def simulate(
    workload: Stream,
    strategy: Strategy,
    scheduler_config: SchedulerConfig | None,
    cost_model: CostModel,
    recorder: Recorder | None = None,
    prefix: PrefixCache | None = None,
) -> SimulationResult:
    """Run a stream to its end. Deterministic: the same inputs give the same result.

    Every step, requests that have arrived are submitted, the scheduler takes memory from the strategy and chooses tokens,
    the cost model says how long the step takes (relocations included), and every request yields the output tokens that
    the trace gives it. A request that ends releases what the stream says. Where nothing is queued or running the clock jumps
    to the next arrival; the recorder's time-weighted means cover steps only, not such gaps.

    Args:
        workload: the stream, run from its start (:meth:`~hybridcache.workloads.base.Stream.fresh`); its token ids are read
            only where prompts are compared.
        strategy: an empty strategy. It is empty again at the end.
        scheduler_config: policies; None for the defaults.
        cost_model: of the model that ``strategy.spec`` describes.
        recorder: observes every step; the caller finishes it.
        prefix: checkpoints from which requests resume, over ``strategy``; None for none. The stream must give token ids.

    Raises:
        RuntimeError: no request can advance although none is too long (a defect of the strategy).
    """
    scheduler = Scheduler(strategy, scheduler_config, prefix=prefix)
    link = _Link(scheduler.prefix, cost_model)
    arrivals = _Arrivals(workload.fresh(), strategy.request_limit())
    now, steps, moved = -math.inf, 0, strategy.bytes_moved
    while scheduler.has_work or arrivals.next_s < math.inf:
        if not scheduler.has_work:
            now = max(now, arrivals.next_s)
        if arrivals.next_s <= now:
            for seq in arrivals.until(now):
                scheduler.submit(seq)
            if not scheduler.has_work:  # all that arrived were refused
                continue
        scheduler.prefix.now_s = now
        step = scheduler.schedule()
        if not step:  # all wait for checkpoints from the host
            now = min(link.next_s, max(arrivals.next_s, now))
            continue
        # The moves themselves have no data to act on; their bytes are charged.
        strategy.drain_moves()
        duration_s = cost_model.step_s(step, strategy.bytes_moved - moved)
        moved = strategy.bytes_moved
        if recorder is not None:
            recorder.step(now, duration_s, strategy, len(scheduler.running), len(scheduler.waiting))
        now += duration_s
        finished = scheduler.complete(step, now)
        steps += 1
        if finished:
            arrivals.ended(finished, now)
        elif recorder is None and scheduler.runs_again(step):
            now, skipped = _skip(scheduler, step, cost_model, now, min(arrivals.next_s, link.next_s))
            steps += skipped
    accepted = arrivals.accepted
    return SimulationResult(accepted, now - accepted[0].arrival_s if accepted else 0.0, steps, tuple(arrivals.refused))


def _skip(scheduler: Scheduler, step: Step, cost_model: CostModel, now_s: float, until_s: float) -> tuple[float, int]:
    """Run the steps at once in which the cohort of the last step decodes and there is nothing to decide; what is seen
    afterwards is what it would be had they run one by one. A request that waits found no memory in the last step, and finds
    none until one of the cohort ends; where the last step did not look, or had no tokens for it, nothing is skipped.

    Returns:
        When the last of them has ended, and how many.
    """
    cohort = step.cohort
    assert cohort is not None
    rows, config, strategy = len(cohort.ids), scheduler.config, scheduler.strategy
    free = cohort.free_steps
    # Pages of one token leave no room: whoever holds some takes more for all steps at once.
    by_token = strategy.cut.entry_tokens == 1
    steps = cohort.steps_left - 1 if by_token else free
    # Under a watermark an admission that fails moves free pages about.
    looked = not (step.preempted or config.watermark) and config.max_tokens_per_step - rows >= config.chunk_multiple
    if not steps or (scheduler.waiting and not looked):
        return now_s, 0
    contexts = int(cohort.totals.sum()) + rows * np.arange(1, steps + 1)
    times = np.cumsum(np.concatenate(([now_s], cost_model.decode_s(rows, contexts))))
    steps = int(np.searchsorted(times[:-1], until_s))
    totals = dict(zip(cohort.ids, (cohort.totals + steps).tolist()))
    if not steps or (steps > free and not strategy.grow_all(totals)):
        return now_s, 0
    strategy.fill(totals)
    cohort.skip(steps)
    np.maximum(cohort.room, cohort.totals, out=cohort.room)
    return float(times[steps]), steps


class _Link:
    """Copies between host and device as time: those to the host are hidden behind the steps, those back come one after the
    other, and a request waits for its own."""

    at_once = True

    class Copy:
        """A copy that ends at ``end_s``."""

        def __init__(self, prefix: PrefixCache, end_s: float) -> None:
            self._prefix, self.end_s = prefix, end_s

        def done(self) -> bool:
            return self._prefix.now_s >= self.end_s

        def synchronize(self) -> None:
            """Time passes elsewhere."""

    def __init__(self, prefix: PrefixCache, cost_model: CostModel) -> None:
        self._prefix, self._cost_model, self._free_s = prefix, cost_model, -math.inf
        if prefix.host is not None:
            prefix.host.mover, prefix.host.recompute_s = self, cost_model.prefill_s
            prefix.host.bytes_per_s = cost_model.device.host_bandwidth

    def out(self, key: int, copy: HostCopy) -> None:
        """To the host."""

    def back(self, key: int, copy: HostCopy, start: int, num_bytes: int) -> "_Link.Copy":
        """To the device."""
        self._free_s = max(self._free_s, self._prefix.now_s) + self._cost_model.host_s(num_bytes)
        return self.Copy(self._prefix, self._free_s)

    def reused(self, transfer: object) -> None:
        """A copy that is given up."""

    @property
    def next_s(self) -> float:
        """When the next copy under way ends; infinite where none is."""
        host = self._prefix.host
        copies = [] if host is None else [recall.transfer for recall in host.recalls.values()]
        return min((copy.end_s for copy in copies if isinstance(copy, _Link.Copy)), default=math.inf)


class _Arrivals:
    """The stream as sequences by arrival, without the requests of more than ``limit`` stored tokens.

    Args:
        stream: at its start.
        limit: tokens.
    """

    def __init__(self, stream: Stream, limit: int) -> None:
        self.accepted: list[Sequence] = []
        self.refused: list[Request] = []
        self._stream, self._limit = stream, limit
        self._unique, self._order = UniqueIds(), count()
        self._due: list[tuple[float, int, Request]] = []
        self.next_s = math.inf
        """When the next request arrives; infinite where none is known."""
        self._expect(stream.begin())

    def _expect(self, requests: Iterable[Request]) -> None:
        for request in requests:
            heappush(self._due, (request.arrival_s, next(self._order), request))
        self.next_s = self._due[0][0] if self._due else math.inf

    def until(self, now_s: float) -> list[Sequence]:
        """The requests that have arrived."""
        found: list[Sequence] = []
        while self.next_s <= now_s:
            at, _, one = heappop(self._due)
            if one.prompt_tokens + one.output_tokens - 1 > self._limit:
                self.refused.append(one)
                self._expect(self._stream.ended(one.request_id, at, aborted=True))
                continue
            found.append(
                SimulatedSequence(
                    one.request_id, one.prompt_tokens, one.output_tokens, at, request=one, unique=self._unique
                )
            )
            self._expect(())
        self.accepted += found
        return found

    def ended(self, finished: Iterable[Sequence], now_s: float) -> None:
        """These requests have all their tokens."""
        for seq in finished:
            assert isinstance(seq, SimulatedSequence)
            seq.request = seq.ids = None
            self._expect(self._stream.ended(seq.seq_id, now_s))
