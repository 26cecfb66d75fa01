"""random_sessions: sessions drawn from a seed, replayed as recorded ones are (:mod:`~hybridcache.workloads.agent_sessions`)."""

import math
import random

from hybridcache.errors import number, whole
from hybridcache.workloads.agent_sessions import AgentSessions
from hybridcache.workloads.agent_trace import BLOCK_TOKENS, Call, Session

MAX_THINK_S = 600.0
PREFILL_S, DECODE_S = 5e-5, 0.02
"""Seconds of service for a token of a prompt and for one of an output."""


def random_sessions(
    *,
    live_sessions: int = 32,
    num_sessions: int = 240,
    turns: float = 8.0,
    system_tokens: int = 1024,
    first_tokens: int = 1024,
    new_tokens: int = 256,
    output_tokens: int = 256,
    sigma: float = 0.8,
    think_s: float = 30.0,
    think_sigma: float = 1.5,
    revised: float = 0.05,
    max_tokens: int = 131_072,
    label: str = "random_sessions",
    seed: int = 0,
) -> AgentSessions:
    """Draw sessions and run them in a closed loop; a prompt holds all that was said before, and its output stands in the next.

    Args:
        live_sessions: run at once; each later one starts the moment that another has ended.
        num_sessions: started in all.
        turns: mean number of requests of a session (geometric).
        system_tokens: that all sessions begin with, in whole 64-token blocks.
        first_tokens, new_tokens, output_tokens: medians of what a user says first and later, and of outputs (lognormal).
        sigma: standard deviation of the logarithm of these lengths.
        think_s, think_sigma: the same of the time between an output's end and the next request, at most
            :data:`MAX_THINK_S`.
        revised: probability that a request leaves what was said at a place drawn uniformly behind the system prompt.
        max_tokens: a session is cut before its first prompt that is longer.
        label: the workload's name in results.
        seed: of everything.

    Raises:
        UserError: a value out of range.
    """
    for name, value in {"live_sessions": live_sessions, "num_sessions": num_sessions, "max_tokens": max_tokens}.items():
        whole(name, value)
    lengths = {"first_tokens": first_tokens, "new_tokens": new_tokens, "output_tokens": output_tokens}
    for name, value in lengths.items():
        whole(name, value)
    for name, given in {"sigma": sigma, "think_s": think_s, "think_sigma": think_sigma, "revised": revised}.items():
        number(name, given)
    number("turns", turns, 1.0)
    system = whole("system_tokens", system_tokens, 0) // BLOCK_TOKENS
    rng = random.Random(f"random_sessions-{whole('seed', seed, 0)}")

    def drawn(median: float, spread: float) -> float:
        return median * math.exp(rng.gauss(0.0, spread))

    def session() -> Session:
        calls, length, end_id, blocks = (
            list[Call](),
            system * BLOCK_TOKENS + max(int(drawn(first_tokens, sigma)), 1),
            0,
            0,
        )
        while True:
            shared, output = blocks, max(int(drawn(output_tokens, sigma)), 1)
            if calls and rng.random() < revised:
                shared = rng.randint(min(system, blocks), blocks)
                length = shared * BLOCK_TOKENS + max(int(drawn(new_tokens, sigma)), 1)
            blocks = length // BLOCK_TOKENS
            runs = ((end_id, blocks - shared),) if blocks > shared else ()
            end_id += blocks - shared
            think = min(drawn(think_s, think_sigma), MAX_THINK_S) if calls else 0.0
            calls.append(Call(length, output, shared, runs, think, PREFILL_S * length + DECODE_S * output))
            length += output + max(int(drawn(new_tokens, sigma)), 1)
            if length > max_tokens or rng.random() < 1.0 / turns:
                return Session(
                    tuple((False, (call,)) for call in calls),
                    max(end_id, 1),
                    min(system, calls[0].prompt_tokens // BLOCK_TOKENS),
                )

    found = RandomSessions(
        f"random_sessions seed={seed}",
        [session() for _ in range(num_sessions)],
        live_sessions,
        max_tokens,
        system > 0,
        seed,
    )
    found.label = label
    return found


class RandomSessions(AgentSessions):
    """The closed loop that :func:`random_sessions` describes."""

    label = "random_sessions"

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    def fresh(self) -> "RandomSessions":
        found = super().fresh()
        assert isinstance(found, RandomSessions)
        found.label = self.label
        return found
