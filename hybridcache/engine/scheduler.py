"""Scheduler: which tokens of which requests run in the next step. One scheduler for every strategy, real or simulated.

Continuous batching with chunked prefill under one token budget per step. Running requests go first, in order of
admission; then waiting ones are admitted first come, first served. A running request that finds no memory preempts
another (or itself): all its memory is released, and it is recomputed from its tokens when it is admitted again, from the
front of the queue. Prompts are cut only at multiples of ``chunk_multiple`` or at their end, so that a recurrent state
exists at those positions.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import repeat

from hybridcache.engine.sequence import Sequence, Status
from hybridcache.engine.step import Cohort, ScheduledTokens, Step
from hybridcache.errors import UserError, bad
from hybridcache.strategies.base import Strategy

ADMISSIONS = ("whole_prompt", "chunk")
VICTIMS = ("last", "least_computed")


@dataclass(frozen=True)
class SchedulerConfig:
    """Policies of the scheduler.

    Args:
        max_running: most requests that may be resident at once.
        max_tokens_per_step: token budget of one step, prefill and decode together.
        chunk_multiple: prompts are cut at multiples of this position.
        admission: ``whole_prompt`` admits only what the strategy can hold as a whole prompt now (vLLM 0.25's rule, which
            still allocates by chunk); ``chunk`` admits as soon as the first chunk fits.
        victim: ``last`` preempts the most recently admitted request; ``least_computed`` the one with the fewest computed
            tokens.
        watermark: fraction of the budget that must stay free after an admission.
    """

    max_running: int = 256
    max_tokens_per_step: int = 8192
    chunk_multiple: int = 64
    admission: str = "whole_prompt"
    victim: str = "last"
    watermark: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_running", "max_tokens_per_step", "chunk_multiple"):
            if getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "give a positive whole number")
        if self.max_tokens_per_step < self.chunk_multiple:
            raise bad(
                "max_tokens_per_step",
                self.max_tokens_per_step,
                f"must hold one chunk of chunk_multiple={self.chunk_multiple} tokens",
            )
        if self.admission not in ADMISSIONS:
            raise bad("admission", self.admission, f"choose one of {', '.join(ADMISSIONS)}")
        if self.victim not in VICTIMS:
            raise bad("victim", self.victim, f"choose one of {', '.join(VICTIMS)}")
        if not 0.0 <= self.watermark < 1.0:
            raise bad("watermark", self.watermark, "give a fraction of the budget, from 0 to below 1")


class Scheduler:
    """Holds the queue and the running set; the strategy holds the memory.

    The caller loops: :meth:`submit` what has arrived, :meth:`schedule` a step, run it, :meth:`complete` it (or
    :meth:`requeue` what failed). A caller that schedules ahead calls the two halves of ``complete`` itself: :meth:`advance`
    once a step is launched, so that the next one can be scheduled, and :meth:`settle` when its tokens have arrived.

    Args:
        strategy: the memory.
        config: the policies.
        before_release: called with a request's id before its memory is returned (tests poison it there).
    """

    def __init__(
        self,
        strategy: Strategy,
        config: SchedulerConfig | None = None,
        before_release: Callable[[int], None] | None = None,
    ) -> None:
        self.strategy = strategy
        self.config = config or SchedulerConfig()
        self.before_release = before_release
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.ending: list[Sequence] = []
        """Requests that will not run again, whose last token is still on its way."""
        self.num_preemptions = 0
        self._decoding: list[Sequence] = []
        """All running requests of a step in which all decoded."""
        self._cohort: Cohort | None = None
        """Of the step scheduled last, as long as nobody joins, leaves or falls back."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, seq: Sequence) -> None:
        """Queue a request.

        Raises:
            UserError: it is longer than the strategy's budget can ever hold; the message names the limit.
        """
        if seq.prompt_len < 1:
            raise bad("prompt_len", seq.prompt_len, "a prompt has at least one token")
        if seq.max_tokens < 1:
            raise bad("max_tokens", seq.max_tokens, "ask for at least one output token")
        limit = self.strategy.request_limit()
        if seq.max_stored_tokens > limit:
            raise UserError(
                f"request {seq.seq_id} needs {seq.max_stored_tokens} tokens of cache (prompt {seq.prompt_len} + output "
                f"{seq.max_tokens} - 1) but {self.strategy.name} holds at most {limit} for one request in "
                f"budget_bytes={self.strategy.budget_bytes}: shorten it or raise the budget"
            )
        seq.status = Status.WAITING
        self.waiting.append(seq)

    def schedule(self) -> Step:
        """Choose the next step and take memory for it. Empty only where there is no work."""
        step = self._schedule_again() or self._schedule_anew()
        if not step and self.has_work:
            raise RuntimeError(
                f"{self.strategy.name}: no request can advance ({len(self.running)} running, {len(self.waiting)} waiting, "
                f"{self.strategy.usage()})"
            )
        return step

    def _schedule_again(self) -> Step | None:
        """The step before again, a token further for each; None where there is no such step, or one finds no memory (what
        was taken for the others stays taken)."""
        cohort, self._cohort = self._cohort, None
        if cohort is None or cohort.pending:
            return None
        cohort.advance()
        for i in cohort.beyond_room():
            if not self.strategy.grow(cohort.ids[i], int(cohort.totals[i])):
                return None
            cohort.room[i] = max(self.strategy.room[cohort.ids[i]], cohort.totals[i])
        self.strategy.fill(dict(zip(cohort.ids, cohort.totals.tolist())))
        step = Step(cohort=cohort)
        if self.waiting:
            admitted: dict[int, ScheduledTokens] = {}
            self._admit_waiting(admitted, self.config.max_tokens_per_step - len(cohort.seqs))
            if admitted:
                return Step([*step.items, *admitted.values()])
        self._cohort = cohort
        return step

    def _schedule_anew(self) -> Step:
        cohort: Cohort | None = None
        preempted: list[Sequence] = []
        chosen: dict[int, ScheduledTokens] = {}
        budget = self._grow_running(preempted, chosen)
        running = len(self.running)
        if not preempted:
            budget = self._admit_waiting(chosen, budget)
        items = list(chosen.values())
        if self.config.max_tokens_per_step - budget > len(items):
            # Not one token each. (Where it is, a prompt of one token was admitted just now and is behind those that decode.)
            items = [i for i in items if i.is_decode] + [i for i in items if not i.is_decode]
        elif items and len(items) == running == len(self.running):
            # Everybody decodes. What takes a moment to set up is worth it from the second such step on.
            if self._decoding == self.running:
                cohort = Cohort(self._decoding, self.strategy.room)
                cohort.advance()
            else:
                self._decoding = list(self.running)
        self._cohort = cohort
        return Step(items, preempted, cohort)

    def _cut(self, seq: Sequence, budget: int) -> int:
        """Tokens of a prompt longer than the budget that fit it, cut only where a prompt may be cut."""
        multiple = self.config.chunk_multiple
        return max((seq.num_computed + budget) // multiple * multiple - seq.num_computed, 0)

    def _grow_running(self, preempted: list[Sequence], chosen: dict[int, ScheduledTokens]) -> int:
        # The hot loop of decoding: a few hundred requests in every step.
        budget, grow, running = self.config.max_tokens_per_step, self.strategy.grow, Status.RUNNING
        room, make = self.strategy.room, tuple.__new__
        within: dict[int, int] = {}
        """Tokens in all of those that decode in the memory that they have."""
        for seq in tuple(self.running):
            if seq.status is not running:
                continue
            start, seq_id = seq.num_computed, seq.seq_id
            tokens = seq.prompt_len + seq.num_output - start
            if tokens == 1 and budget and start < room[seq_id]:
                within[seq_id] = start + 1
                chosen[seq_id] = make(ScheduledTokens, (seq, start, 1))
                budget -= 1
                continue
            if tokens > budget:
                tokens = self._cut(seq, budget)
                if tokens == 0:
                    continue
            while not grow(seq_id, start + tokens):
                victim = self._victim(seq)
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
        return budget

    def _admit_waiting(self, chosen: dict[int, ScheduledTokens], budget: int) -> int:
        """Returns what is left of the token budget, as :meth:`_grow_running` does."""
        while self.waiting and len(self.running) < self.config.max_running:
            seq = self.waiting[0]
            tokens = seq.num_known - seq.num_computed
            if tokens > budget:
                tokens = self._cut(seq, budget)
            if tokens == 0 or not self._admit(seq, tokens):
                break
            self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            chosen[seq.seq_id] = ScheduledTokens(seq, seq.num_computed, tokens)
            budget -= tokens
        return budget

    def _admit(self, seq: Sequence, tokens: int) -> bool:
        whole = seq.num_known if self.config.admission == "whole_prompt" else None
        if not self.strategy.admit(seq.seq_id, tokens, prompt_tokens=whole):
            return False
        if self.config.watermark and self.running:
            free = self.strategy.usage().free
            if free < self.config.watermark * self.strategy.budget_bytes:
                self._release(seq)
                return False
        return True

    def _victim(self, seq: Sequence) -> Sequence:
        """Who makes room for ``seq``: possibly ``seq`` itself."""
        if self.config.victim == "least_computed":
            return min(reversed(self.running), key=lambda other: other.num_computed)
        return self.running[-1]

    def _preempt(self, seq: Sequence) -> None:
        self._drop(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def requeue(self, seqs: Collection[Sequence]) -> None:
        """After a step that failed: drop the memory of these requests, and their tokens that are still on their way. They are
        recomputed from the others, from the front of the queue, in the order in which they were admitted. Not counted as
        preemptions."""
        for seq in seqs:
            if seq.status is Status.WAITING:
                seq.num_output = seq.num_settled
        for seq in reversed([seq for seq in self.running if seq in seqs]):
            self._drop(seq)
            seq.num_output = seq.num_settled
        for seq in reversed([seq for seq in self.ending if seq in seqs]):
            self.ending.remove(seq)
            self._wait_again(seq)
            seq.num_output = seq.num_settled

    def _drop(self, seq: Sequence) -> None:
        self._release(seq)
        self.running.remove(seq)
        self._wait_again(seq)

    def _wait_again(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        seq.recomputed_tokens += seq.num_computed
        seq.num_computed = 0
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self._cohort = None
        if self.before_release is not None:
            self.before_release(seq.seq_id)
        self.strategy.release(seq.seq_id)

    def complete(self, step: Step, now_s: float, stopped: Collection[int] = ()) -> list[Sequence]:
        """Account for a step that ran. ``stopped``: ids whose newly sampled token ended them. Returns the finished."""
        return self.settle(self.advance(step), now_s, stopped)

    def decoding(self, step: Step) -> list[Sequence] | None:
        """The requests of a step that is the last one again, as long as all of them run; None otherwise."""
        return step.cohort.seqs if step.cohort is not None and step.cohort is self._cohort else None

    def advance(self, step: Step) -> list[Sequence]:
        """Count a step's tokens as computed. Returns the requests that sampled, in the step's order: each has one more known
        token, whichever it turns out to be. One that has ``max_tokens`` now will not run again and returns its memory."""
        if step.cohort is not None and step.cohort is self._cohort:
            return self._advance_all(step.cohort)
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

    def _advance_all(self, cohort: Cohort) -> list[Sequence]:
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
        """Its last token is on its way."""
        self._release(seq)
        self.running.remove(seq)
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
            sampled: what :meth:`advance` returned for it; those that have finished meanwhile are passed over.
            now_s: the time at which the tokens arrived.
            stopped: ids whose token ended them. Tokens that a later step sampled for them are forgotten.
            token_ids: the token of each, appended to its ``output_ids``; None where there are none (simulation).

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
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
        elif seq.status is Status.ENDING:
            self.ending.remove(seq)
        else:
            self._release(seq)
            self.running.remove(seq)
        seq.num_output = seq.num_settled
        seq.num_computed = min(seq.num_computed, seq.num_known)
        seq.status, seq.finish_s, seq.finish_reason = Status.FINISHED, now_s, reason
