"""Sequence: one request on its way through the scheduler. No torch: the simulator uses it too."""

from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDING = "ending"
    """The last token is on its way; the memory is returned already."""
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's progress in tokens and its times in seconds (of whatever clock drives the scheduler).

    ``prompt_len + num_output`` tokens are *known*; the first ``num_computed`` of them are in the cache. When all known
    tokens are computed, the step that did so yields one more output token. The last output token is never stored.

    A token counts as known, and the next step may build on it, from the moment its step was launched. Which token it is
    shows later: ``num_output - num_settled`` output tokens are still on their way.
    """

    seq_id: int
    prompt_len: int
    max_tokens: int
    arrival_s: float = 0.0
    output_ids: list[int] = field(default_factory=list)
    """Sampled token ids (stays empty in simulation)."""

    status: Status = Status.WAITING
    num_computed: int = 0
    num_output: int = 0
    num_settled: int = 0
    """Output tokens whose step has ended."""
    num_preemptions: int = 0
    recomputed_tokens: int = 0
    """Tokens whose cache was dropped at a preemption and had to be computed again."""
    hit_tokens: int = 0
    """Tokens that the request did not compute when it was first admitted, because it resumed from a checkpoint of them."""
    refound_tokens: int = 0
    """Tokens that it did not compute when it was admitted again, or that a sibling had computed."""
    admissions: int = 0
    recomputed_after_failure: int = 0
    """Tokens whose cache was dropped because a step failed or was interrupted, and had to be computed again."""
    first_token_s: float | None = None
    finish_s: float | None = None
    finish_reason: str | None = None
    siblings: "tuple[Sequence, ...]" = field(default=(), repr=False)
    """All requests that give outputs of its prompt, itself among them; empty where there is one."""

    @property
    def num_known(self) -> int:
        return self.prompt_len + self.num_output

    @property
    def fork_at(self) -> int:
        """Position from which its siblings resume: that of the prompt's last token, which each of them computes for itself, to
        sample its own first output token. 0 where there are no siblings."""
        return self.prompt_len - 1 if self.siblings else 0

    @property
    def max_stored_tokens(self) -> int:
        """Most tokens that this request can ever have in the cache."""
        return self.prompt_len + self.max_tokens - 1

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, queueing included."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a single one."""
        if self.finish_s is None or self.first_token_s is None or self.num_output < 2:
            return None
        return (self.finish_s - self.first_token_s) / (self.num_output - 1)
