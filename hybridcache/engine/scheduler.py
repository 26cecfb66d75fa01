"""Scheduler: chooses the tokens of the next step, for every strategy, in real inference and in simulation.

Continuous batching with chunked prefill under one token budget per step. Running requests go first, in order of
admission; then waiting ones are admitted first come, first served. A running request that finds no memory preempts
another one (or itself): the victim's memory is released, and it is recomputed from its tokens when it is admitted again, from
the front of the queue. Prompts are cut only at multiples of ``chunk_multiple`` or at their end, so that a recurrent state
exists at those positions.
"""

import numpy as np

from hybridcache.engine.policies import SchedulerConfig
from hybridcache.engine.queues import Queues
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import Cohort, ScheduledTokens, Step
from hybridcache.prefix.points import Point

__all__ = ["Scheduler", "SchedulerConfig"]


class Scheduler(Queues):
    """Chooses the steps; see the module. :class:`.Queues` has the arguments.

    The caller loops: :meth:`submit` what has arrived, :meth:`schedule` a step, run it, :meth:`complete` it (or
    :meth:`requeue` what failed).
    """

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
