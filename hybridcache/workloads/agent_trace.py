"""The recording that :mod:`~hybridcache.workloads.agent_sessions` replays: one session of a coding agent a line."""

from dataclasses import dataclass
from typing import NamedTuple

from hybridcache.workloads.trace_file import Line

BLOCK_TOKENS = 64
"""Tokens that one block id stands for."""
_FORM = "[t_s, input_tokens, output_tokens, shared, [[first_id, count], ...], think_s, api_s]"


class Call(NamedTuple):
    """One recorded request."""

    prompt_tokens: int
    output_tokens: int
    shared: int
    """Blocks that are those of the request before it in reading order."""
    runs: tuple[tuple[int, int], ...]
    """``(first id, count)`` of the blocks behind."""
    think_s: float
    service_s: float | None


@dataclass(frozen=True)
class Session:
    """One line of the trace."""

    lists: tuple[tuple[bool, tuple[Call, ...]], ...]
    """In reading order: whether it is a sub-agent's, and its requests (one, for a main request)."""
    end_id: int
    """Block ids lie below."""
    system_blocks: int
    """Whole blocks of tools and system prompt at the start of the first prompt."""

    @property
    def first_prompt_tokens(self) -> int:
        return self.lists[0][1][0].prompt_tokens


def read_session(line: Line, max_think_s: float) -> Session:
    """Read one line; think times are cut to ``max_think_s``.

    Raises:
        UserError: a field that is malformed, or contradicts the request before it.
    """
    expected = f"a list of requests {_FORM} and sub-agents {{'sub': [requests]}}, a request first"
    items = line.get("requests", expected)
    if not isinstance(items, list) or not items or isinstance(items[0], dict):
        raise line.bad("requests", items if not isinstance(items, list) else items[:1], expected)
    lists, before, end_id = [], 0, 0
    for item in items:
        is_sub = isinstance(item, dict)
        calls = item.get("sub") if is_sub else [item]
        if not isinstance(calls, list):
            raise line.bad("sub", calls, "a list of requests")
        read = []
        for fields in calls:
            call = _call(line, fields, before, max_think_s)
            before = call.prompt_tokens // BLOCK_TOKENS
            end_id = max([end_id, *(at + count for at, count in call.runs)])
            read.append(call)
        if read:
            lists.append((is_sub, tuple(read)))
    system = line.tokens("tool_tokens", 0) + line.tokens("system_tokens", 0)
    return Session(tuple(lists), end_id, system // BLOCK_TOKENS)


def _call(line: Line, fields: object, before: int, max_think_s: float) -> Call:
    """One request; ``before`` is the number of blocks of the request before it."""
    if not isinstance(fields, list) or len(fields) != 7:
        raise line.bad("requests", fields, _FORM)
    names = ("t_s", "input_tokens", "output_tokens", "shared", "new", "think_s", "api_s")
    one = Line(line.path, line.number, dict(zip(names, fields)))
    one.seconds("t_s")
    prompt, output, shared = one.tokens("input_tokens"), one.tokens("output_tokens", 0), one.tokens("shared", 0)
    think_s = one.seconds("think_s") if fields[5] is not None else 0.0
    service_s = one.seconds("api_s") if fields[6] is not None else None
    for name, value in (("think_s", think_s), ("api_s", service_s or 0.0)):
        if value < 0:
            raise one.bad(name, value, "a time of at least 0")
    runs = fields[4]
    if not isinstance(runs, list) or not all(_is_run(run) for run in runs):
        raise line.bad("new", runs, "a list of [first_id, count], of at least 0 and 1")
    if shared > before:
        raise line.bad("shared", shared, f"at most the {before} blocks of the request before it")
    count = shared + sum(run[1] for run in runs)
    if count != prompt // BLOCK_TOKENS:
        raise line.bad(
            "new", f"{count} blocks", f"{prompt // BLOCK_TOKENS} (input_tokens={prompt}) with the shared ones"
        )
    runs_found = tuple((at, number) for at, number in runs)
    return Call(prompt, max(output, 1), shared, runs_found, min(think_s, max_think_s), service_s)


def _is_run(run: object) -> bool:
    whole_numbers = isinstance(run, list) and len(run) == 2 and all(type(value) is int for value in run)
    return whole_numbers and run[0] >= 0 and run[1] >= 1  # type: ignore[index]
