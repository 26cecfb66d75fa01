"""Scheduler: chooses the tokens of the next step, for every strategy, in real inference and in simulation.

Continuous batching with chunked prefill under one token budget per step. Running requests go first, in order of
admission; then waiting ones are admitted first come, first served. A running request that finds no memory preempts
another one (or itself): the victim's memory is released, and it is recomputed from its tokens when it is admitted again, from
the front of the queue. Prompts are cut only at multiples of ``chunk_multiple`` or at their end, so that a recurrent state
exists at those positions.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from itertools import repeat

import numpy as np

from hybridcache.engine.policies import SchedulerConfig, check_length
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import Cohort, ScheduledTokens, Step
from hybridcache.prefix.cache import PrefixCache
from hybridcache.prefix.points import Point
from hybridcache.strategies.base import Strategy


class Scheduler:
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

    def schedule(self) -> Step:
        """Choose the next step and take memory for it. The step is empty only where there is no work, or all of it waits
        for checkpoints from the host."""
        step = self._schedule_again() or self._schedule_anew([])
        while not step and step.preempted and self.running:
            # The request for which tokens were set aside lost its memory; the others go on.
            step = self._schedule_anew(step.preempted)
        if not step and self.has_work and not self.prefix.recalling:
            counts = f"{len(self.running)} running, {len(self.waiting)} waiting"
            raise RuntimeError(f"{self.strategy.name}: no request can advance ({counts}, {self.strategy.usage()})")
        if self.prefix.on and step.cohort is None:
            step.checkpoints = self.prefix.plan(step.items)
        return step

    def _schedule_again(self) -> Step | None:
        """Repeat the cohort's step, a token further for each. None where there is no cohort or a request finds no memory (the
        others keep what they took)."""
        cohort, self._cohort = self._cohort, None
        if cohort is None or cohort.pending or self._behind is not None:
            return None
        cohort.advance()
        totals = cohort.totals
        for i in np.flatnonzero(totals > cohort.room).tolist():
            if not self.strategy.grow(cohort.ids[i], int(totals[i])):
                return None
            cohort.room[i] = max(self.strategy.room[cohort.ids[i]], totals[i])
        self.strategy.fill(dict(zip(cohort.ids, totals.tolist())))
        step = Step(cohort=cohort)
        if self.waiting:
            admitted: dict[int, ScheduledTokens] = {}
            self._admit_waiting(admitted, self.config.max_tokens_per_step - len(cohort.seqs))
            if admitted:
                return Step([*step.items, *admitted.values()])
        self._cohort = cohort
        return step

    def _schedule_anew(self, preempted: list[Sequence]) -> Step:
        cohort: Cohort | None = None
        chosen: dict[int, ScheduledTokens] = {}
        budget = self._grow_running(preempted, chosen)
        running = len(self.running)
        if not preempted:
            budget = self._admit_waiting(chosen, budget)
        items = list(chosen.values())
        if self.config.max_tokens_per_step - budget > len(items):
            # Some rows prefill: order decodes first. Rows of one token each are ordered already: a prompt of one token was
            # admitted just now and stands behind the decodes.
            items = [i for i in items if i.is_decode] + [i for i in items if not i.is_decode]
        elif items and len(items) == running == len(self.running):
            # Each row has one token. A second such step in a row makes a cohort, if every row samples: a prompt that was
            # cut to one token does not.
            if self._decoding == self.running and all(item.start and item.samples for item in items):
                cohort = Cohort(self._decoding, self.strategy.room)
                cohort.advance()
            else:
                self._decoding = list(self.running)
        self._cohort = cohort
        return Step(items, preempted, cohort)

    def _cut(self, start: int, budget: int) -> int:
        """Tokens from ``start`` that fit the budget, for a prompt that is longer and may be cut only at multiples."""
        multiple = self.config.chunk_multiple
        return max((start + budget) // multiple * multiple - start, 0)

    def _set_aside(self) -> int:
        """Tokens to set aside for the request left behind, if it still runs or is next to be admitted."""
        seq = self._behind
        if seq is None or not (seq.status is Status.RUNNING or (self.waiting and self.waiting[0] is seq)):
            self._behind = None
            return 0
        multiple = self.config.chunk_multiple
        return min(seq.num_known - seq.num_computed, multiple - seq.num_computed % multiple)

    def _grow_running(self, preempted: list[Sequence], chosen: dict[int, ScheduledTokens]) -> int:
        # The hot loop of decoding: a few hundred requests in every step.
        budget, grow, running = self.config.max_tokens_per_step, self.strategy.grow, Status.RUNNING
        room, make = self.strategy.room, tuple.__new__
        aside, first = self._set_aside(), self._behind
        self._behind = None
        if first is not None and first.status is Status.WAITING and not preempted:
            budget -= aside - self._admit_waiting(chosen, aside, most=1)
            aside = 0
        budget -= aside
        early = tuple(chosen)
        within: dict[int, int] = {}
        """Tokens after this step, of requests that decode within the memory that they hold."""
        for seq in tuple(self.running):
            if seq.status is not running or seq.seq_id in chosen:
                continue
            if seq is first:
                budget += aside
                aside = 0
            start, seq_id = seq.num_computed, seq.seq_id
            tokens = seq.prompt_len + seq.num_output - start
            if tokens == 1 and budget and start < room[seq_id]:
                within[seq_id] = start + 1
                chosen[seq_id] = make(ScheduledTokens, (seq, start, 1))
                budget -= 1
                continue
            if seq.siblings and start < seq.fork_at:
                tokens = seq.fork_at - start
            if tokens > budget:
                tokens = self._cut(start, budget)
            if tokens > 1 and self.prefix.on:
                tokens = self.prefix.cut(seq, start, tokens)
            if tokens == 0:
                self._left_behind(seq)
                continue
            # A request holds more already where a step was scheduled and not run.
            while not grow(seq_id, max(start + tokens, self.strategy.num_tokens(seq_id))):
                if self.prefix.make_room(urgent=True):
                    continue
                victim = self.config.choose_victim(self.running)  # possibly seq itself
                lost = chosen.pop(victim.seq_id, None)
                within.pop(victim.seq_id, None)
                budget += lost.num_tokens if lost else 0
                self._preempt(victim)
                preempted.append(victim)
                if victim is seq:
                    break
            else:
                chosen[seq.seq_id] = ScheduledTokens(seq, start, tokens)
                budget -= tokens
        self.strategy.fill(within)
        for seq_id in early:  # admitted early: order them behind the decodes
            if seq_id in chosen:
                chosen[seq_id] = chosen.pop(seq_id)
        return budget + aside

    def _left_behind(self, seq: Sequence) -> None:
        """Note a request that the token budget left out; of several, the one with the fewest computed tokens is next."""
        if self._behind is None or seq.num_computed < self._behind.num_computed:
            self._behind = seq

    def _admit_waiting(self, chosen: dict[int, ScheduledTokens], budget: int, most: int | None = None) -> int:
        """Admit waiting requests, at most ``most``. Returns what is left of the token budget."""
        at = 0
        while at < len(self.waiting) and len(self.running) < self.config.max_running and most != 0:
            seq = self.waiting[at]
            found = None
            if self.prefix.on:
                if self.prefix.holds_back(seq):
                    at += 1
                    continue
                found = self.prefix.find(seq)
            start = 0 if found is None else found.position
            tokens = seq.num_known - start
            if start < seq.fork_at:
                tokens = seq.fork_at - start
            if tokens > budget:
                tokens = self._cut(start, budget)
            if tokens > 1 and self.prefix.on:
                tokens = self.prefix.cut(seq, start, tokens)
            if tokens == 0:
                self._left_behind(seq)
                break
            if not self._admit(seq, start + tokens, found):
                if found is not None and not self.running and not chosen:
                    if self.prefix.holds_back(seq):  # its checkpoint is on its way from the host
                        continue
                    # A hit that does not fit an empty pool becomes a miss.
                    self.prefix.make_room(urgent=True, idle=True)
                    continue
                break
            own = seq.admissions > 0 or 0 < seq.fork_at == start
            if self.prefix.on:
                self.prefix.admitted(seq, found, first=not own)
            if own:
                seq.refound_tokens += start
            else:
                seq.hit_tokens = start
            seq.admissions += 1
            seq.num_computed = start
            del self.waiting[at]
            seq.status = Status.RUNNING
            self.running.append(seq)
            chosen[seq.seq_id] = ScheduledTokens(seq, seq.num_computed, tokens)
            budget -= tokens
            most = None if most is None else most - 1
        return budget

    def _admit(self, seq: Sequence, tokens: int, found: Point | None) -> bool:
        """Take memory for the first ``tokens`` tokens; those of the checkpoint ``found`` are shared with it. Where memory is
        short, checkpoints that nobody waits for are evicted, and ``found`` is taken over."""
        whole = seq.num_known if self.config.admission == "whole_prompt" else None
        admitted = self.prefix.admit(seq, found, tokens, whole, urgent=not self.running)
        if admitted and self.config.watermark and self.running:
            free = self.strategy.usage().free
            if free < self.config.watermark * self.strategy.budget_bytes:
                self._release(seq)
                return False
        return admitted

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
