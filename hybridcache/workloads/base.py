"""Request streams: what a workload is, for the simulator and the engine alike.

A :class:`Workload` is open: its arrival times are fixed. In a closed loop the next request of a user arrives after the last
one has ended; such a stream is a class of its own. Both are a :class:`Stream`, which says what arrives as others end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hybridcache.errors import UserError, bad, number, whole


class LazyIds:
    """Token ids (int32) that are made anew whenever they are read, so that a long stream need not hold those of all its
    requests at once. ``np.asarray`` gives them.

    Args:
        length: how many.
        make: returns so many ids.
    """

    def __init__(self, length: int, make: Callable[[], np.ndarray]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._make(), dtype=dtype)


TokenIds = np.ndarray | tuple[int, ...] | LazyIds
"""Token ids of a prompt; ``np.asarray`` takes any of them. In simulation equal ids mean equal content, and an id may be any
int32, negative ones included."""


@dataclass(frozen=True, eq=False)
class Request:
    """One request of a stream. Two are equal where all their fields are, token by token.

    Args:
        request_id: unique in its stream.
        arrival_s: seconds on the stream's clock, which starts at 0.
        prompt_tokens, output_tokens: at least 1 each.
        prompt_ids: as many as prompt tokens; None where a trace gives lengths only.
        output_ids: the ids that a simulated request samples, as many as output tokens, where later prompts begin with them;
            None where nobody reads them.
        service_s: how long the recorded system took, for a serial replay; None where unknown.
        session: which conversation or agent session the request belongs to; None for none.
        turn: its place in the session, from 0.

    Raises:
        UserError: a length below 1, or another number of ids than of tokens.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_ids: TokenIds | None = None
    output_ids: np.ndarray | tuple[int, ...] | None = None
    service_s: float | None = None
    session: int | None = None
    turn: int = 0

    def __post_init__(self) -> None:
        for what in ("prompt", "output"):
            tokens, ids = getattr(self, f"{what}_tokens"), getattr(self, f"{what}_ids")
            if tokens < 1:
                raise bad(f"{what}_tokens", tokens, f"request {self.request_id} needs at least one {what} token")
            if ids is not None and len(ids) != tokens:
                raise bad(f"{what}_ids", f"{len(ids)} ids", f"{what}_tokens says {tokens}")
        if self.service_s is not None:
            number("service_s", self.service_s)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Request):
            return NotImplemented
        return all(np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return hash((self.request_id, self.arrival_s, self.prompt_tokens, self.output_tokens))


@runtime_checkable
class Stream(Protocol):
    """What arrives, as others end. A stream serves one run; :meth:`fresh` gives another one at its start."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """Where it comes from: a path, or generator and seed."""

    def fresh(self) -> "Stream":
        """The same stream at its start."""

    def begin(self) -> Sequence[Request]:
        """The requests whose arrival is known at the start; to be called once, first."""

    def ended(
        self, request_id: int, now_s: float, output_ids: Sequence[int] | np.ndarray | None = None, aborted: bool = False
    ) -> Sequence[Request]:
        """The requests that the end of this one releases; none of them arrives before ``now_s``.

        Args:
            request_id: has been released, and has not ended before.
            now_s: the time on the stream's clock.
            output_ids: what was really sampled; None for what the stream foresaw (``Request.output_ids``).
            aborted: the request was refused or got not all its tokens. Its session ends with it: nothing of it is released
                any more, only what follows a session.
        """


@dataclass(frozen=True)
class Workload:
    """A named open stream, ordered by arrival. ``source`` says where it came from (a path, or generator and seed)."""

    name: str
    source: str
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise bad("workload", self.name, f"{self.source} gave no request")

    def fresh(self) -> "Workload":
        return self

    def begin(self) -> Sequence[Request]:
        """All requests."""
        return self.requests

    def ended(self, request_id: int, now_s: float, output_ids: Any = None, aborted: bool = False) -> Sequence[Request]:
        """None: all arrivals are known at the start."""
        return ()

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


def open_loop(stream: Stream) -> Workload:
    """The stream, for a caller that must know all requests beforehand.

    Raises:
        UserError: it is a closed loop.
    """
    if not isinstance(stream, Workload):
        raise UserError(
            f"workload={stream.name}: what arrives depends on what has ended, and this run needs all arrivals beforehand; "
            "choose a workload with fixed arrivals"
        )
    return stream


class UniqueIds:
    """Ids that nobody else has: -1, -2, ... in order of :meth:`take`."""

    def __init__(self) -> None:
        self._last = 0

    def take(self, count: int) -> np.ndarray:
        """``count`` new ids (int32)."""
        first, self._last = self._last - 1, self._last - count
        if self._last < -(1 << 31):
            raise UserError(
                f"the stream has more than {1 << 31:,} tokens of their own, which int32 cannot number; cut it"
            )
        return np.arange(first, self._last - 1, -1, dtype=np.int32)


def check_ids(first_id: int, end_id: int) -> None:
    """Refuse a range that holds no id, or ids beyond int32."""
    whole("first_id", first_id, 0)
    if whole("end_id", end_id) <= first_id or end_id > 1 << 31:
        raise bad("end_id", end_id, f"must lie above first_id={first_id}, and at most at {1 << 31}")


def uniform_ids(rng: np.random.Generator, first_id: int, end_id: int, count: int) -> np.ndarray:
    """``count`` ids (int32) of ``first_id .. end_id - 1``, uniform and independent."""
    return rng.integers(first_id, end_id, count, dtype=np.int32)
