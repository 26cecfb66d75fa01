"""Planned: the checkpoints that a step is to make, and the table by which a prefill kernel makes them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hybridcache.errors import bad
from hybridcache.prefix.placement import POSITION_MULTIPLE
from hybridcache.prefix.points import Place
from hybridcache.strategies.base import Strategy


class Scheduled(Protocol):
    """Tokens ``start .. end - 1`` of a request, which one step computes."""

    @property
    def seq(self) -> Any: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


class Planned(NamedTuple):
    """A checkpoint that a step is to make."""

    key: int
    request: Any
    position: int
    place: Place
    inside: bool
    """Whether the prefill kernel writes it inside a chunk; otherwise it shares the states that the step leaves."""


def check_positions(positions: Iterable[int], prompt_len: int) -> None:
    """Refuse positions that no step can keep.

    Raises:
        UserError: a position lies beyond the prompt, or inside it at no multiple of 64.
    """
    for position in positions:
        if not 1 <= position <= prompt_len:
            raise bad("checkpoint_at", position, f"give positions from 1 to the prompt's {prompt_len} tokens")
        if position % POSITION_MULTIPLE and position != prompt_len:
            raise bad(
                "checkpoint_at", position, f"give multiples of {POSITION_MULTIPLE}, or the prompt's end {prompt_len}"
            )


def checkpoint_table(
    planned: Iterable[Planned], prefilling: Sequence[Scheduled], strategy: Strategy, prefill_rows: int
) -> np.ndarray | None:
    """Entries (int32 ``[P, N, L]``) to which a prefill kernel writes the states at the ``n``-th multiple of 64 behind each
    row's start; -1 keeps none. None where no checkpoint lies inside a chunk."""
    inside = {(plan.request.seq_id, plan.position): plan.key for plan in planned if plan.inside}
    if not inside:
        return None
    multiple = POSITION_MULTIPLE
    most = max(item.end // multiple - item.start // multiple for item in prefilling)
    table = np.full((prefill_rows, most, len(strategy.spec.state_layers)), -1, dtype=np.int32)
    for row, item in enumerate(prefilling):
        first = item.start // multiple + 1
        for number in range(item.end // multiple - item.start // multiple):
            key = inside.get((item.seq.seq_id, (first + number) * multiple))
            if key is not None:
                table[row, number] = strategy.checkpoint_table(key)
    return table
