"""Queues: requests from their submission to their end, and the memory that they hold and give back.

The part of :class:`~hybridcache.engine.scheduler.Scheduler` that does not choose what the next step computes.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import repeat

from hybridcache.engine.policies import SchedulerConfig, check_length
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import Cohort, Step
from hybridcache.prefix.cache import PrefixCache
from hybridcache.strategies.base import Strategy


class Queues:
    """Holds the queue and the running set; the strategy holds the memory.

    The caller loops: :meth:`submit` what has arrived, :meth:`schedule` a step, run it, :meth:`complete` it (or
    :meth:`requeue` what failed). A caller that schedules ahead calls the two halves of ``complete`` itself: :meth:`advance`
    once a step is launched, so that the next one can be scheduled, and :meth:`settle` when its tokens have arrived.

    Args:
        strategy: owns the memory.
        config: the policies; None for the defaults.
        before_release: called with a request's id before its memory is returned (tests poison it there).
        prefix: what prompts may resume from; None for nothing.
    """

    def __init__(
        self,
        strategy: Strategy,
        config: SchedulerConfig | None = None,
        before_release: Callable[[int], None] | None = None,
        prefix: PrefixCache | None = None,
    ) -> None:
        self.strategy = strategy
        self.prefix = PrefixCache(strategy) if prefix is None else prefix
        self.config = config or SchedulerConfig()
        self.before_release = before_release
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.ending: list[Sequence] = []
        """Requests that will not run again; their last token is still on its way."""
        self.num_preemptions = 0
        self._decoding: list[Sequence] = []
        """The running requests of the last step, if all of them decoded."""
        self._cohort: Cohort | None = None
        """The requests of the step scheduled last, as long as nobody joins, leaves or falls back."""
        self._behind: Sequence | None = None
        """A request for which the last step had no tokens left. The next step sets a chunk aside for it; otherwise prompts
        would wait as long as the others decode."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, seq: Sequence) -> None:
        """Queue a request. Raises UserError where it is longer than the strategy's budget can ever hold."""
        check_length(seq, self.strategy)
        seq.status = Status.WAITING
        self.waiting.append(seq)
        if self.prefix.on:
            self.prefix.submitted(seq)

    def _preempt(self, seq: Sequence) -> None:
        if self.prefix.on:
            self.prefix.preempting(seq)
        seq.recomputed_tokens += seq.num_computed
        self._wait_again(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def requeue(self, seqs: Collection[Sequence]) -> None:
        """After a step that failed: drop these requests' memory and their tokens that are still on the way. They wait at the
        front of the queue, in the order of their admission, and are recomputed from the tokens that arrived. This does not
        count as preemption."""
        for seq in seqs:
            if seq.status is Status.WAITING:
                seq.num_output = seq.num_settled
        for group in (self.running, self.ending):
            for seq in reversed([seq for seq in group if seq in seqs]):
                seq.recomputed_after_failure += seq.num_computed
                self._wait_again(seq)
                seq.num_output = seq.num_settled

    def restart(self, seqs: Iterable[Sequence]) -> None:
        """After an interrupt at whatever line: forget queue, running set and cohort, empty the strategy and drop all
        checkpoints. The requests that have not finished wait, in the order given."""
        self.strategy.reset()
        self.prefix.clear()
        self._cohort, self._behind, self._decoding = None, None, []
        self.running.clear()
        self.ending.clear()
        self.waiting.clear()
        for seq in seqs:
            if seq.status is Status.FINISHED:
                continue
            seq.recomputed_after_failure += seq.num_computed
            seq.status, seq.num_computed = Status.WAITING, 0
            seq.num_output = seq.num_settled
            self.waiting.append(seq)
            if self.prefix.on:
                self.prefix.submitted(seq)

    def _leave(self, seq: Sequence) -> None:
        """Take a request from where it stands; one that runs returns its memory."""
        if seq.status is Status.RUNNING:
            self._release(seq)
        at: dict[Status, list[Sequence] | deque[Sequence]] = {
            Status.WAITING: self.waiting, Status.RUNNING: self.running, Status.ENDING: self.ending,
        }  # fmt: skip
        at[seq.status].remove(seq)

    def _wait_again(self, seq: Sequence) -> None:
        self.prefix.left(seq)
        self._leave(seq)
        seq.status = Status.WAITING
        seq.num_computed = 0
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self._cohort = None
        if self.before_release is not None:
            self.before_release(seq.seq_id)
        self.strategy.release(seq.seq_id)

    def complete(self, step: Step, now_s: float, stopped: Collection[int] = ()) -> list[Sequence]:
        """Account for a step that ran; the new token of the ids in ``stopped`` ended them. Returns the finished requests."""
        return self.settle(self.advance(step), now_s, stopped)

    def runs_again(self, step: Step) -> bool:
        """Whether a step repeats the last one and all its requests still run."""
        return step.cohort is not None and step.cohort is self._cohort

    def advance(self, step: Step) -> list[Sequence]:
        """Count a step's tokens as computed. Returns the requests that sampled, in the step's order: each has one more known
        token, whichever it turns out to be. A request that reaches ``max_tokens`` runs no more and returns its memory."""
        if step.cohort is not None and step.cohort is self._cohort:
            return self._advance_all(step.cohort)
        self.strategy.settle_states(item.seq.seq_id for item in step.items)
        self._keep(step)
        sampled = []
        for seq, start, num_tokens in step.items:
            seq.num_computed = computed = start + num_tokens
            if computed < seq.prompt_len + seq.num_output:
                continue
            seq.num_output += 1
            sampled.append(seq)
            if seq.num_output >= seq.max_tokens:
                self._end(seq)
        return sampled

    def _keep(self, step: Step) -> None:
        """Make the checkpoints of a launched step. A request that shares its states with one writes the next ones elsewhere, so
        the step cannot repeat."""
        if step.checkpoints:
            self.prefix.keep(step.checkpoints)
            self._cohort = None

    def void(self, step: Step) -> None:
        """Discard the checkpoints of a step that failed: nobody may resume from them."""
        self.prefix.discard(step.checkpoints, step.seqs)

    def _advance_all(self, cohort: Cohort) -> list[Sequence]:
        self.strategy.settle_states()
        cohort.pending = False
        for seq in cohort.seqs:
            seq.num_computed += 1
            seq.num_output += 1
        cohort.steps_left -= 1
        if cohort.steps_left == 0:
            for seq in cohort.seqs:
                if seq.num_output >= seq.max_tokens:
                    self._end(seq)
        return cohort.seqs

    def _end(self, seq: Sequence) -> None:
        """Retire a request whose last token is on its way."""
        self.prefix.ending(seq)
        self._leave(seq)
        seq.status = Status.ENDING
        self.ending.append(seq)

    def settle(
        self,
        sampled: Collection[Sequence],
        now_s: float,
        stopped: Collection[int] = (),
        token_ids: Iterable[int] | None = None,
    ) -> list[Sequence]:
        """Account for the tokens of a step that has ended.

        Args:
            sampled: the requests that :meth:`advance` returned; those that have finished meanwhile are passed over.
            now_s: the time at which the tokens arrived.
            stopped: ids of requests that their token ended. Tokens that a later step sampled for them are forgotten.
            token_ids: a token for each request, appended to its ``output_ids``; None in simulation.

        Returns:
            The requests that finished.
        """
        over, finished = Status.FINISHED, []
        for seq, token in zip(sampled, repeat(None) if token_ids is None else token_ids):
            if seq.status is over:
                continue
            if token is not None:
                seq.output_ids.append(token)
            seq.num_settled = settled = seq.num_settled + 1
            if settled == 1 and seq.first_token_s is None:
                seq.first_token_s = now_s
            if stopped and seq.seq_id in stopped:
                self.abort(seq, now_s, "stop")
            elif settled >= seq.max_tokens:
                self.abort(seq, now_s, "length")
            else:
                continue
            finished.append(seq)
        return finished

    def abort(self, seq: Sequence, now_s: float, reason: str = "abort") -> None:
        """End a request, wherever it stands; its memory is free at once, and tokens still on their way are forgotten. A
        finished one stays as it is."""
        if seq.status is Status.FINISHED:
            return
        if reason not in ("length", "stop"):
            self.prefix.left(seq)
        elif seq.status is Status.RUNNING:
            self.prefix.ending(seq)
        self._leave(seq)
        seq.num_output = seq.num_settled
        seq.num_computed = min(seq.num_computed, seq.num_known)
        seq.status, seq.finish_s, seq.finish_reason = Status.FINISHED, now_s, reason
        self.prefix.ended(seq)
