"""What an engine tells of its steps."""

from dataclasses import dataclass, field

from hybridcache.engine.sequence import Sequence


@dataclass
class StepOutput:
    """What one step gave: the new token of every request that sampled, and the requests that ended."""

    new_tokens: dict[int, int] = field(default_factory=dict)
    finished: list[Sequence] = field(default_factory=list)


@dataclass
class HostTimes:
    """Seconds that the host spent in steps, since construction."""

    steps: int = 0
    total_s: float = 0.0
    wait_s: float = 0.0
    """Of ``total_s``, waiting for the device."""

    @property
    def work_ms_per_step(self) -> float:
        """Milliseconds of host work in a step, waiting excluded."""
        return (self.total_s - self.wait_s) / max(self.steps, 1) * 1e3
