"""Checkpoints: keeps states at positions of prompts, so that later requests resume from them.

A recurrent state cannot be cut, so a prompt can only go on from a position at which its states were kept. A checkpoint is
an owner of blocks beside the running requests: the states at its position, and the KV up to there. Where the position is the
end of a step, it shares the states that the step leaves (the request writes its next ones elsewhere); where it lies inside a
prefill chunk, the prefill kernel writes them to blocks of the checkpoint's own. A request that begins with a checkpoint's
tokens shares the KV, reads the states from the checkpoint and writes its own.

Checkpoints are made where a request asks for them (``SamplingParams.checkpoint_at``) and never cost a running request memory:
when blocks are short, the checkpoint used longest ago is dropped first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hybridcache.errors import bad
from hybridcache.strategies.base import Strategy

POSITION_MULTIPLE = 64
"""A prefill kernel can keep the states at multiples of this position. (A step leaves those at its end, wherever that is.)"""


class Request(Protocol):
    """The part of an engine's request that checkpoints read."""

    seq_id: int
    params: Any
    """Its ``checkpoint_at`` gives the positions at which to keep a checkpoint."""

    @property
    def num_known(self) -> int: ...

    def tokens(self, start: int, end: int) -> np.ndarray: ...


class Scheduled(Protocol):
    """Tokens ``start .. end - 1`` of a request, which one step computes."""

    @property
    def seq(self) -> Any: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


class Checkpoint(NamedTuple):
    """The blocks owned by ``key`` hold the states and KV of a prompt's first ``position`` tokens."""

    key: int
    position: int
    tokens: bytes
    """The tokens' own bytes (int64), compared on a hit: equal hashes are not taken for equal prompts."""


class Planned(NamedTuple):
    """A checkpoint that a step is to make."""

    key: int
    request: Request
    position: int
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


class Checkpoints:
    """All checkpoints of one engine; see the module.

    Args:
        strategy: holds their blocks; nobody else makes cached owners in it.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.now_s = 0.0
        """The time before the step that is scheduled next; the driver of a simulation sets it."""
        self.hit_tokens = 0
        """Tokens that requests did not have to compute."""
        self.asked = False
        """Whether any request has asked for a checkpoint."""
        self._known: OrderedDict[tuple[int, bytes], Checkpoint] = OrderedDict()
        """Checkpoints by position and hash of the tokens; the one used longest ago comes first."""
        self._lengths: dict[int, int] = {}
        """Number of checkpoints at each position."""
        self._next_key = 0

    def __len__(self) -> int:
        return len(self._known)

    def find(self, request: Request) -> Checkpoint | None:
        """The longest checkpoint whose tokens the request begins with and goes beyond; None where there is none."""
        if not self._known:
            return None
        tokens = request.tokens(0, request.num_known - 1)
        for position in sorted((p for p in self._lengths if p <= len(tokens)), reverse=True):
            head = tokens[:position].tobytes()
            found = self._known.get((position, _hash(head)))
            if found is not None and found.tokens == head:
                return found
        return None

    def used(self, checkpoint: Checkpoint) -> None:
        """Count a hit: a request resumed from the checkpoint."""
        self.hit_tokens += checkpoint.position
        self._known.move_to_end((checkpoint.position, _hash(checkpoint.tokens)))

    def plan(self, items: Iterable[Scheduled]) -> list[Planned]:
        """The checkpoints that a step is to make; those inside a chunk take blocks of their own, and are not made where there
        is no memory."""
        planned = []
        for item in items:
            request: Request = item.seq
            for position in request.params.checkpoint_at:
                if item.start < position <= item.end and not self._holds(request, position):
                    inside = position < item.end
                    key, self._next_key = self._next_key, self._next_key + 1
                    if not inside or self.strategy.reserve_checkpoint(request.seq_id, key, position):
                        planned.append(Planned(key, request, position, inside))
        return planned

    def keep(self, planned: Iterable[Planned]) -> None:
        """Make the checkpoints of a step that was launched: requests admitted after it may resume from them."""
        for key, request, position, inside in planned:
            if not inside:
                self.strategy.checkpoint(request.seq_id, key)
            tokens = request.tokens(0, position).tobytes()
            name = (position, _hash(tokens))
            if name in self._known:  # two requests of one step had the same prompt
                self._forget(name)
            self._known[name] = Checkpoint(key, position, tokens)
            self._lengths[position] = self._lengths.get(position, 0) + 1

    def discard(self, planned: Iterable[Planned]) -> None:
        """Drop the checkpoints of a step that failed: what they hold is void."""
        keys = {plan.key for plan in planned}
        for name in [name for name, checkpoint in self._known.items() if checkpoint.key in keys]:
            self._forget(name)
        for key in keys & set(self.strategy.cached):
            self.strategy.drop(key)

    def drop_oldest(self) -> bool:
        """Drop the checkpoint used longest ago. False where there is none."""
        if not self._known:
            return False
        self._forget(next(iter(self._known)))
        return True

    def clear(self) -> None:
        """Forget all checkpoints; the strategy has forgotten them already."""
        self._known.clear()
        self._lengths.clear()

    def _holds(self, request: Request, position: int) -> bool:
        tokens = request.tokens(0, position).tobytes()
        found = self._known.get((position, _hash(tokens)))
        return found is not None and found.tokens == tokens

    def _forget(self, name: tuple[int, bytes]) -> None:
        checkpoint = self._known.pop(name)
        self._lengths[checkpoint.position] -= 1
        if not self._lengths[checkpoint.position]:
            del self._lengths[checkpoint.position]
        self.strategy.drop(checkpoint.key)


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


def _hash(tokens: bytes) -> bytes:
    return hashlib.blake2b(tokens, digest_size=16).digest()
