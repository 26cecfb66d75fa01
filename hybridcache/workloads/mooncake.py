"""mooncake: the traces of Mooncake (Qin et al., FAST 2025), lengths and the hashes of every 512-token block of a prompt."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hybridcache.errors import whole
from hybridcache.workloads.base import LazyIds, Request, Workload
from hybridcache.workloads.trace_file import Line, Row, Window, json_lines, trace_path

BLOCK_TOKENS = 512
"""Tokens that one hash id stands for (the last block of a prompt may be shorter)."""
_MASK = (1 << 64) - 1


def mooncake(
    *, path: str | Path | None = None, max_requests: int | None = None, start_s: float = 0.0, time_scale: float = 1.0,
    with_prompt_ids: bool = False, vocab_size: int = 151_936,
) -> Workload:  # fmt: skip
    """Read a Mooncake trace (JSON lines with ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids``).

    Args:
        path: ``conversation_trace.jsonl``, ``toolagent_trace.jsonl``, ``synthetic_trace.jsonl`` or ``mooncake_trace.jsonl``.
        max_requests, start_s, time_scale: see :class:`Window`.
        with_prompt_ids: give every request its token ids, made when they are read (``LazyIds``). Equal hashes become equal
            ids and different ones different ids, so the trace's prefix sharing survives.
        vocab_size: the ids lie in ``0 .. vocab_size - 1``.

    Raises:
        UserError: no such file, a malformed line (named), or a value out of range.
    """
    window = Window(max_requests, start_s, time_scale)
    vocab_size = whole("vocab_size", vocab_size, 2)
    found = trace_path(path, "Mooncake trace", "the GitHub repository kvcache-ai/Mooncake (FAST25-release/traces)")
    rows = [_row(line, with_prompt_ids) for line in json_lines(found)]
    chosen, source = window.choose(rows, found)
    requests = []
    for i, (arrival_s, row) in enumerate(chosen):
        ids = LazyIds(row.prompt_tokens, partial(_prompt_ids, row, vocab_size)) if with_prompt_ids else None
        requests.append(Request(i, arrival_s, row.prompt_tokens, row.output_tokens, ids))
    return Workload("mooncake", source, tuple(requests))


def block_ids(hash_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The token ids (int32) that stand for hashed blocks: splitmix64 of ``hash_id * 512 + position``, modulo the
    vocabulary."""
    first = np.array([(hash_id * BLOCK_TOKENS) & _MASK for hash_id in hash_ids], dtype=np.uint64)
    x = np.add.outer(first, np.arange(1, BLOCK_TOKENS + 1, dtype=np.uint64)).ravel()
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(vocab_size)).astype(np.int32)


def _prompt_ids(row: Row, vocab_size: int) -> np.ndarray:
    assert row.hash_ids is not None
    return block_ids(row.hash_ids, vocab_size)[: row.prompt_tokens]


def _row(line: Line, with_hashes: bool) -> Row:
    time_s, prompt, output = (
        line.seconds("timestamp") / 1000.0,
        line.tokens("input_length"),
        line.tokens("output_length"),
    )
    return Row(time_s, prompt, output, _hashes(line, prompt) if with_hashes else None)


def _hashes(line: Line, prompt_tokens: int) -> tuple[int, ...]:
    count = -(-prompt_tokens // BLOCK_TOKENS)
    expected = f"{count} whole numbers (input_length={prompt_tokens} in blocks of {BLOCK_TOKENS})"
    value = line.get("hash_ids", expected)
    if not isinstance(value, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise line.bad("hash_ids", value, expected)
    if len(value) != count:
        raise line.bad("hash_ids", f"{len(value)} ids", expected)
    return tuple(value)
