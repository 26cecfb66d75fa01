"""StepOutput and HostTimes: what an engine reports of its steps."""

from dataclasses import dataclass, field

from hybridcache.engine.sequence import Sequence


@dataclass
class StepOutput:
    """The new token of every request that sampled in a step, by id, and the requests that ended."""

    new_tokens: dict[int, int] = field(default_factory=dict)
    finished: list[Sequence] = field(default_factory=list)


@dataclass
class HostTimes:
    """Seconds that the host spent in steps, since construction."""

    steps: int = 0
    total_s: float = 0.0
    wait_s: float = 0.0
    """Part of ``total_s`` in which the host waited for the device."""

    @property
    def work_ms_per_step(self) -> float:
        """Milliseconds of host work in a step, waiting excluded."""
        return (self.total_s - self.wait_s) / max(self.steps, 1) * 1e3
