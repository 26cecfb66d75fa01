"""Policies of the scheduler: what a step may hold, who is admitted, who is preempted."""

from dataclasses import dataclass

from hybridcache.errors import bad

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
