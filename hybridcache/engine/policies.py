"""Policies of the scheduler: what a step may hold, who is admitted, who is preempted."""

from dataclasses import dataclass

from hybridcache.engine.sequence import Sequence
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

    def choose_victim(self, running: list[Sequence]) -> Sequence:
        """Which of the running requests makes room for another of them, or for itself."""
        if self.victim == "least_computed":
            return min(reversed(running), key=lambda seq: seq.num_computed)
        return running[-1]


def check_length(seq: Sequence, strategy: Strategy) -> None:
    """Refuse a request that could never end.

    Raises:
        UserError: no token, or more than the strategy's budget can ever hold; the message names the limit.
    """
    if seq.prompt_len < 1:
        raise bad("prompt_len", seq.prompt_len, "a prompt has at least one token")
    if seq.max_tokens < 1:
        raise bad("max_tokens", seq.max_tokens, "ask for at least one output token")
    limit = strategy.request_limit()
    if seq.max_stored_tokens > limit:
        raise UserError(
            f"request {seq.seq_id} needs {seq.max_stored_tokens} tokens of cache (prompt {seq.prompt_len} + output "
            f"{seq.max_tokens} - 1) but {strategy.name} holds at most {limit} for one request in "
            f"budget_bytes={strategy.budget_bytes}: shorten it or raise the budget"
        )
