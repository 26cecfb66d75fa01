"""agent_sessions: recorded sessions of coding agents, replayed in a closed loop, with the token ids of their prompts.

A session is a list of requests, most of which go on from the prompt before; a sub-agent's list stands between two of them. A
request starts its think time after the previous one of its own list has ended (a sub-agent's first one: after the main
request before it), and never before a sub-agent in between has ended. Sub-agents that stand side by side run at once.

The trace names the content of every whole 64-token block of a prompt. Of a prompt's tail and of the output it says nothing
itself; where the next prompt of the same list goes on from this prompt's blocks, they are what stands there in it, so that
prompt and output are a prefix of the next prompt as far as its blocks go. Everything else occurs once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache.errors import UserError, bad, number, whole
from hybridcache.workloads.agent_trace import BLOCK_TOKENS, Call, Session, read_session
from hybridcache.workloads.base import Request, UniqueIds
from hybridcache.workloads.trace_file import json_lines, trace_path

FIRST_STARTS_S = 60.0
"""The first ``live_sessions`` sessions start at moments drawn uniformly from so many seconds."""


@dataclass(eq=False)
class _Turn:
    """One request to be replayed."""

    call: Call
    blocks: np.ndarray
    turn: int
    following: "_Turn | None" = None
    """The next one of the same list."""
    subs: "list[_Turn]" = None  # type: ignore[assignment]
    """The first requests of the sub-agents behind a main request; None in a sub-agent's list."""


def agent_sessions(
    *,
    path: str | Path | None = None,
    live_sessions: int = 32,
    num_sessions: int = 240,
    max_think_s: float = 600.0,
    max_tokens: int = 262_144,
    share_system: bool = False,
    seed: int = 0,
) -> "AgentSessions":
    """Replay recorded agent sessions (JSON lines, plain or ``.xz``) in a closed loop.

    Args:
        path: one session a line, ``{"id", "tool_tokens", "system_tokens", "requests": [...]}``; a request is ``[t_s,
            input_tokens, output_tokens, shared, new, think_s, api_s]``, where ``shared`` leading 64-token blocks are those of
            the request before it (reading order) and ``new`` lists ``[first_id, count]`` of the block ids behind; a
            sub-agent stands in place as ``{"sub": [requests]}``.
        live_sessions: run at once. The first ones start within :data:`FIRST_STARTS_S`; each later one the moment that
            another has ended.
        num_sessions: started in all, in an order that the seed draws. Where the trace has fewer, each is started again
            after all of them were, as a session of its own.
        max_think_s: longer think times are cut to this.
        max_tokens: a session is cut before its first main request with a longer prompt, and a sub-agent's list before its
            own; a session without a request left is passed over, and does not count as started.
        share_system: assume that tools and system prompt are the same tokens in all sessions, as far as the shorter goes.
            The trace does not say so: without it, sessions share nothing.
        seed: of the order and of the first starts.

    Raises:
        UserError: no such file, a malformed line (named), a value out of range, no session of at most ``max_tokens``, or more
            content than int32 ids can name.
    """
    found = trace_path(
        path,
        "trace of agent sessions",
        "the GitHub repository callanjfox/kv-cache-tester, to be brought into the form of docs/adding_a_workload.md",
    )
    counts = {"live_sessions": live_sessions, "num_sessions": num_sessions, "max_tokens": max_tokens}
    for name, value in counts.items():
        whole(name, value)
    whole("seed", seed, 0)
    number("max_think_s", max_think_s)
    if not isinstance(share_system, bool):
        raise bad("share_system", share_system, "give true or false")
    sessions = [read_session(line, float(max_think_s)) for line in json_lines(found)]
    if not sessions:
        raise UserError(f"{found}: holds no session; give a trace with at least one")
    kept = [session for session in sessions if session.first_prompt_tokens <= max_tokens]
    if not kept:
        raise bad("max_tokens", max_tokens, f"every session of {found} begins with a longer prompt; raise it")
    draw, order = random.Random(f"sessions-{seed}"), list[Session]()
    while len(order) < num_sessions:
        draw.shuffle(kept)
        order += kept
    source = f"{found} ({num_sessions:,} session starts of {len(kept):,} sessions, {live_sessions} at once, seed={seed}"
    source += ", tools and system prompt taken as shared)" if share_system else ")"
    return AgentSessions(source, order[:num_sessions], live_sessions, max_tokens, share_system, seed)


class AgentSessions:
    """The closed loop that :func:`agent_sessions` describes; a :class:`~hybridcache.workloads.base.Stream`.

    Ids of blocks are not negative, and those of different session starts are disjoint; ids that occur once are negative.
    """

    name = "agent_sessions"

    def __init__(
        self, source: str, starts: Sequence[Session], live: int, max_tokens: int, share_system: bool, seed: int
    ) -> None:
        self.source = source
        self._options = (live, max_tokens, share_system, seed)
        self._starts = starts
        self._common = BLOCK_TOKENS * max(session.system_blocks for session in starts) if share_system else 0
        total = self._common + BLOCK_TOKENS * sum(session.end_id for session in starts)
        if total > 1 << 31:
            raise bad(
                "num_sessions", len(starts), f"their blocks have {total:,} ids, more than int32 holds; start fewer"
            )
        self._offset = self._common
        self._next = 0
        self._unique = UniqueIds()
        self._running: dict[int, tuple[_Live, _Turn]] = {}
        self._next_request = 0

    def fresh(self) -> "AgentSessions":
        return type(self)(self.source, self._starts, *self._options)

    def begin(self) -> list[Request]:
        """The first request of each of the first ``live_sessions`` sessions."""
        draw = random.Random(f"starts-{self._options[3]}")
        at = sorted(draw.uniform(0.0, FIRST_STARTS_S) for _ in range(min(self._options[0], len(self._starts))))
        return [self._start(start_s) for start_s in at]

    def ended(self, request_id: int, now_s: float, output_ids: Any = None, aborted: bool = False) -> list[Request]:
        """See :class:`~hybridcache.workloads.base.Stream`. The recorded outputs stand in the recorded prompts, whatever was
        sampled: ``output_ids`` change nothing."""
        live, turn = self._running.pop(request_id)
        following = live.ended(turn, now_s, aborted)
        if not following and not live.running and self._next < len(self._starts):
            return [self._start(now_s)]
        return [self._release(live, turn, at) for turn, at in following]

    def _start(self, now_s: float) -> Request:
        _, max_tokens, share_system, _ = self._options
        session = self._starts[self._next]
        live = _Live(self._next, session, max_tokens, self._offset, share_system)
        self._offset += BLOCK_TOKENS * session.end_id
        self._next += 1
        return self._release(live, live.first, now_s)

    def _release(self, live: "_Live", turn: _Turn, arrival_s: float) -> Request:
        request_id, self._next_request = self._next_request, self._next_request + 1
        self._running[request_id] = (live, turn)
        call = turn.call
        ids, prompt = live.ids(turn, self._unique), call.prompt_tokens
        return Request(
            request_id,
            arrival_s,
            prompt,
            call.output_tokens,
            prompt_ids=ids[:prompt],
            output_ids=ids[prompt:],
            service_s=call.service_s,
            session=live.number,
            turn=turn.turn,
        )


class _Live:
    """A session that runs: what it still has to do, and what its blocks hold."""

    def __init__(self, number: int, session: Session, max_tokens: int, offset: int, share_system: bool) -> None:
        self.number = number
        self.running = 1
        """Requests that were released and have not ended."""
        self._main_end_s = 0.0
        self._aborted = False
        self._waiting: _Turn | None = None
        """The last main request that has ended."""
        self.first = self._plan(session, max_tokens)
        self._first_token = offset + BLOCK_TOKENS * np.arange(session.end_id, dtype=np.int32)
        """Of each block id, the token id at its start."""
        if share_system:
            system = self.first.blocks[: session.system_blocks]
            self._first_token[system] = BLOCK_TOKENS * np.arange(len(system))

    @staticmethod
    def _plan(session: Session, max_tokens: int) -> _Turn:
        blocks, number = np.empty(0, np.int32), 0
        first = main = None
        for is_sub, calls in session.lists:
            if not is_sub and calls[0].prompt_tokens > max_tokens:
                break
            before, cut = None if is_sub else main, False
            for call in calls:
                new = [np.arange(at, at + count, dtype=np.int32) for at, count in call.runs]
                blocks = np.concatenate([blocks[: call.shared], *new])
                cut = cut or call.prompt_tokens > max_tokens
                if cut:  # its blocks are read all the same: the next request may share them
                    continue
                turn, number = _Turn(call, blocks, number, subs=None if is_sub else []), number + 1  # type: ignore[arg-type]
                if before is not None:
                    before.following = turn
                elif is_sub:
                    assert main is not None
                    main.subs.append(turn)
                before = turn
            if not is_sub:
                main = before
                first = first or main
        assert first is not None
        return first

    def ended(self, turn: _Turn, now_s: float, aborted: bool) -> list[tuple[_Turn, float]]:
        """The requests that this one's end releases, with their arrivals."""
        self.running -= 1
        self._aborted |= aborted
        if self._aborted:
            return []
        found: list[tuple[_Turn, float]] = []
        if turn.subs is None:
            if turn.following is not None:
                found = [(turn.following, now_s + turn.following.call.think_s)]
        else:
            self._main_end_s, self._waiting = now_s, turn
            found = [(sub, now_s + sub.call.think_s) for sub in turn.subs]
        if not found and not self.running:
            assert self._waiting is not None
            main = self._waiting.following
            if main is not None:
                found = [(main, max(self._main_end_s + main.call.think_s, now_s))]
        self.running += len(found)
        return found

    def ids(self, turn: _Turn, unique: UniqueIds) -> np.ndarray:
        """Prompt and output (int32)."""
        blocks, following = turn.blocks, turn.following
        if following is not None and np.array_equal(following.blocks[: len(blocks)], blocks):
            blocks = following.blocks
        length = turn.call.prompt_tokens + turn.call.output_tokens
        blocks = blocks[: -(-length // BLOCK_TOKENS)]
        known = np.add.outer(self._first_token[blocks], np.arange(BLOCK_TOKENS, dtype=np.int32)).ravel()[:length]
        missing = length - len(known)
        return np.concatenate([known, unique.take(missing)]) if missing else known
