"""Request streams: what a workload is, for the simulator and the engine alike."""

from dataclasses import dataclass, replace

from hybridcache.errors import bad


@dataclass(frozen=True)
class Request:
    """One request of a stream. ``prompt_ids`` is None where a trace gives lengths only."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise bad("prompt_tokens", self.prompt_tokens, f"request {self.request_id} needs at least one prompt token")
        if self.output_tokens < 1:
            raise bad("output_tokens", self.output_tokens, f"request {self.request_id} needs at least one output token")
        if self.prompt_ids is not None and len(self.prompt_ids) != self.prompt_tokens:
            raise bad("prompt_ids", f"{len(self.prompt_ids)} ids", f"prompt_tokens says {self.prompt_tokens}")


@dataclass(frozen=True)
class Workload:
    """A named stream, ordered by arrival. ``source`` says where it came from (a path, or generator and seed)."""

    name: str
    source: str
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise bad("workload", self.name, f"{self.source} gave no request")

    def first(self, count: int | None) -> "Workload":
        """The earliest ``count`` requests (None: all); where that cuts the stream, ``source`` says so."""
        if count is None or count >= len(self.requests):
            return self
        source = f"{self.source} (first {count:,} of {len(self.requests):,} requests)"
        return replace(self, source=source, requests=self.requests[:count])

    def within(self, limit: int) -> tuple[Request, ...]:
        """The requests that store at most ``limit`` tokens (the last output token is never stored)."""
        return tuple(r for r in self.requests if r.prompt_tokens + r.output_tokens - 1 <= limit)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)
