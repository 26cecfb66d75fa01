"""simulate: a request stream through the real scheduler and a real strategy, on a clock that a cost model advances."""

from dataclasses import dataclass

from hybridcache.engine.scheduler import Scheduler, SchedulerConfig
from hybridcache.engine.sequence import Sequence
from hybridcache.observe.metrics import Recorder
from hybridcache.sim.cost_model import CostModel
from hybridcache.strategies.base import Strategy
from hybridcache.workloads.base import Request, Workload


@dataclass(frozen=True)
class SimulationResult:
    """What a simulated run did."""

    sequences: list[Sequence]
    """All requests that ran, finished, in order of the stream; those refused are not among them."""
    duration_s: float
    """From the first arrival of a request that ran to the end of the last step; 0 where none ran."""
    steps: int
    refused_requests: tuple[Request, ...]
    """Requests that the strategy's budget can never hold (``Strategy.request_limit``); they never entered the queue."""

    @property
    def refused(self) -> int:
        """How many requests were refused. Strategies that refuse differently do unequal work: compare them on requests that
        all of them hold."""
        return len(self.refused_requests)


def simulate(
    workload: Workload, strategy: Strategy, scheduler_config: SchedulerConfig | None, cost_model: CostModel,
    recorder: Recorder | None = None,
) -> SimulationResult:  # fmt: skip
    """Run a stream to its end. Deterministic: the same inputs give the same result.

    Every step, requests that have arrived are submitted, the scheduler takes memory from the strategy and chooses tokens,
    the cost model says how long the step takes (relocations included), and every request yields the output tokens that
    the trace gives it. Where nothing is queued or running the clock jumps to the next arrival; the recorder's
    time-weighted means cover steps only, not such gaps.

    Args:
        workload: the stream; a request's ``prompt_ids`` are not looked at.
        strategy: an empty strategy. It is empty again at the end.
        scheduler_config: policies; None for the defaults.
        cost_model: of the model that ``strategy.spec`` describes.
        recorder: observes every step; the caller finishes it.

    Raises:
        RuntimeError: no request can advance although none is too long (a defect of the strategy).
    """
    scheduler = Scheduler(strategy, scheduler_config)
    accepted, refused = _accept(workload, strategy)
    now = first_arrival = accepted[0].arrival_s if accepted else 0.0
    next_arrival, steps, moved = 0, 0, strategy.bytes_moved
    while next_arrival < len(accepted) or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, accepted[next_arrival].arrival_s)
        while next_arrival < len(accepted) and accepted[next_arrival].arrival_s <= now:
            scheduler.submit(accepted[next_arrival])
            next_arrival += 1
        step = scheduler.schedule()
        # The moves themselves have no data to act on; their bytes are charged.
        strategy.drain_moves()
        duration_s = cost_model.step_s(step, strategy.bytes_moved - moved)
        moved = strategy.bytes_moved
        if recorder is not None:
            recorder.step(now, duration_s, strategy, len(scheduler.running), len(scheduler.waiting))
        now += duration_s
        scheduler.complete(step, now)
        steps += 1
    return SimulationResult(accepted, now - first_arrival, steps, tuple(refused))


def _accept(workload: Workload, strategy: Strategy) -> tuple[list[Sequence], list[Request]]:
    """The stream as sequences by arrival, and the requests that the strategy's budget can never hold."""
    held = workload.within(strategy.request_limit())
    ids = {request.request_id for request in held}
    accepted = [
        Sequence(request.request_id, request.prompt_tokens, request.output_tokens, request.arrival_s)
        for request in sorted(held, key=lambda request: request.arrival_s)
    ]
    return accepted, [request for request in workload.requests if request.request_id not in ids]
