"""AlignPrefix: vLLM's prefix caching of hybrid models under its own rules (``--mamba-cache-mode align``).

vLLM 0.25.1 (variant None), with blocks of ``A`` tokens (:mod:`~hybridcache.prefix.peers.blocks`):

* A hit is the longest multiple of ``A``, at most all tokens but one, whose KV blocks are all cached and whose states
  are cached in every linear group.
* States are kept at the ends of prefill chunks that are multiples of ``A``, one block for each linear group. A chunk
  that would cross the last multiple of ``A`` in its prompt stops there, one that ends earlier is cut to a multiple.
  Where more KV than states is found, the next chunk stops where the KV ends (0.25's admission at shared prefixes, pull
  request 37898). After the prompt, states are kept at every multiple of ``A``.
* States that a running request has moved on from enter the queue at once; KV enters when its request ends, its last
  block first.
* Blocks are named when a step is scheduled. States named in the same step cannot be read in it: the request waits for
  the next.

Variant ``vllm_0.31``: blocks are found at multiples of 64 tokens (``--prefix-match-unit 64``; a partial KV block is
copied), and states are kept only at the end of prompts, cut to 64 (retention interval 0), at shared prefixes seen a
second time, and at the last multiple of ``A`` that an answer has reached, when it ends (pull request 50551).
"""

from collections.abc import Iterable
from hashlib import blake2b
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from hybridcache.errors import bad
from hybridcache.prefix.peers.blocks import AlignPages
from hybridcache.prefix.peers.without_host import WithoutHost

MATCH_UNIT = 64
VARIANTS = (None, "vllm_0.31")


class Found(NamedTuple):
    """From where a request resumes."""

    position: int
    kv: list[int]
    states: list[int]
    digest: bytes


class _Known:
    """Digests of a request's tokens, one for each whole block."""

    __slots__ = ("branch", "digests", "kept_at", "seq")

    def __init__(self, seq: Any) -> None:
        self.seq = seq
        self.digests: list[bytes] = []
        self.branch = 0
        """Where the cached KV of its prompt ends, and states are to be kept."""
        self.kept_at = 0
        """Tokens before the states that are kept until it ends."""


class AlignPrefix(WithoutHost):
    """See the module.

    Args:
        strategy: empty.
        variant: None or ``vllm_0.31``.
        chunk_tokens: a step's tokens, where a prompt is not cut by anything else (vLLM's ``max_num_batched_tokens``).
    """

    points: tuple[Any, ...] = ()

    def __init__(self, strategy: AlignPages, variant: str | None = None, chunk_tokens: int = 8192) -> None:
        if variant not in VARIANTS:
            raise bad("variant", variant, f"choose one of {VARIANTS}")
        self.strategy, self.variant = strategy, variant
        self.sparse = variant is not None
        self.block = strategy.block_tokens
        self.unit = gcd(self.block, MATCH_UNIT) if self.sparse else self.block
        self.chunk_tokens = max(chunk_tokens, self.block)
        self.on = True
        self.now_s = 0.0
        self.hit_tokens = 0
        self._states = strategy.state_groups
        self._kv = range(self._states, self._states + strategy.attention_groups)
        strategy.watch = self._moves
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._known: dict[int, _Known] = {}
        self._fresh: set[bytes] = set()
        """States named in this step."""
        self._tails: dict[bytes, set[int]] = {}
        """Tokens behind a whole block at which states were kept, by its digest."""
        self._contents: dict[bytes, dict[int, tuple[int, np.ndarray]]] = {}
        """Tokens of KV blocks, and how often the block had been taken by then, by the digest of the block before."""
        self._fresh_s = self.now_s
        self.strategy.pool.forget()

    @property
    def evicted(self) -> int:
        """Named blocks that were taken for something else."""
        return self.strategy.pool.lost

    # -- finding ---------------------------------------------------------------------------------------------------

    def submitted(self, seq: Any) -> None:
        self._known[seq.seq_id] = _Known(seq)

    def holds_back(self, seq: Any) -> bool:
        return False

    def _digests(self, known: _Known, count: int) -> list[bytes]:
        """Digests of the first ``count`` blocks at least."""
        digests, size = known.digests, 4 * self.block
        if len(digests) < count:
            start, last = len(digests), digests[-1] if digests else b""
            view = self._bytes(known, start * self.block, count * self.block)
            for at in range(count - start):
                last = blake2b(view[at * size : (at + 1) * size], digest_size=12, key=last).digest()
                digests.append(last)
        return digests

    def _bytes(self, known: _Known, start: int, end: int) -> memoryview:
        return memoryview(known.seq.tokens(start, end).astype(np.int32).tobytes())

    def _digest_at(self, known: _Known, position: int) -> bytes:
        whole, tail = divmod(position, self.block)
        before = self._digests(known, whole)[whole - 1] if whole else b""
        if not tail:
            return before
        return blake2b(
            self._bytes(known, position - tail, position), digest_size=12, key=before, person=b"tail"
        ).digest()

    def find(self, seq: Any) -> Found | None:
        """The deepest position with KV and states."""
        known, found, block = self._known[seq.seq_id], self.strategy.pool.found, self.block
        most = seq.num_known - 1
        digests = self._digests(known, most // block)
        whole = 0
        while whole < most // block and all((group, digests[whole]) in found for group in self._kv):
            whole += 1
        known.branch = whole * block + (self._part(known, whole, most - whole * block) if self.sparse else 0)
        for at in range(whole, -1, -1):
            before = digests[at - 1] if at else b""
            tails = {tail for tail in self._tails.get(before, ()) if at * block + tail <= known.branch}
            for tail in sorted(tails | ({0} if at else set()), reverse=True):
                digest = self._digest_at(known, at * block + tail)
                names = [(group, digest) for group in range(self._states)]
                if all(name in found for name in names):
                    kv = [next(iter(found[g, digests[i]])) for i in range(at) for g in self._kv]
                    return Found(at * block + tail, kv, [next(iter(found[name])) for name in names], digest)
        return None

    def _part(self, known: _Known, whole: int, most: int) -> int:
        """Tokens (a multiple of the unit, at most ``most``) that some block behind the first ``whole`` ones shares with
        it."""
        pool, best = self.strategy.pool, 0
        contents = self._contents.get(known.digests[whole - 1] if whole else b"", {})
        ids = known.seq.tokens(whole * self.block, whole * self.block + min(most, self.block))
        for block, (taken, tokens) in list(contents.items()):
            if pool.taken[block] != taken:
                del contents[block]
                continue
            count = min(len(ids), len(tokens))
            differ = ids[:count] != tokens[:count]
            best = max(best, int(differ.argmax()) if differ.any() else count)
        return best // self.unit * self.unit

    def cut(self, seq: Any, start: int, tokens: int) -> int:
        """Tokens from ``start`` of a chunk that may have ``tokens``; 0 where it cannot be cut as the rules demand."""
        known, unit, prompt = self._known[seq.seq_id], self.unit, max(seq.prompt_len, seq.num_known - 1)
        if start >= prompt:
            return min(tokens, self.block - start % self.block)
        tokens = min(tokens, self.chunk_tokens)
        end, last = start + tokens, seq.num_known // unit * unit
        if start < known.branch < end:
            return known.branch - start
        if end < last:
            return max(end // self.block * self.block - start, 0)
        return last - start if start < last < end else tokens

    # -- requests --------------------------------------------------------------------------------------------------

    def admit(self, seq: Any, found: Found | None, tokens: int, prompt: int | None = None, *, urgent: bool) -> bool:
        """Take memory; cached blocks are taken from the queue's head as they come."""
        if self._fresh_s != self.now_s:
            self._fresh.clear()
            self._fresh_s = self.now_s
        if urgent:
            self._fresh.clear()
        if found is not None and found.digest in self._fresh:
            return False
        kv, states = ([], []) if found is None else (found.kv, found.states)
        if not self.strategy.admit_found(seq.seq_id, tokens, prompt, kv, states):
            return False
        known = self._known[seq.seq_id]
        known.kept_at = 0
        self._moves(seq.seq_id, tokens)
        return True

    def admitted(self, seq: Any, found: Found | None, first: bool) -> None:
        if found is not None and first:
            self.hit_tokens += found.position

    def plan(self, items: Iterable[Any]) -> list[Any]:
        """Names what a scheduled step computes."""
        for item in items:
            if not item.is_decode:
                self._moves(item.seq.seq_id, item.end)
        return []

    def keep(self, planned: Iterable[Any]) -> None:
        self._fresh.clear()

    def discard(self, planned: Iterable[Any], seqs: Iterable[Any] = ()) -> None:
        """A step failed: nothing that is cached is trusted."""
        self.strategy.pool.forget()

    def left(self, seq: Any) -> None:
        if seq.seq_id in self._known and seq.seq_id in self.strategy.residents:
            self._moves(seq.seq_id, seq.num_computed)

    def ending(self, seq: Any) -> None:
        """The request ends: what it computed keeps its names in the queue."""
        known = self._known.get(seq.seq_id)
        if known is None or seq.seq_id not in self.strategy.residents:
            return
        self._moves(seq.seq_id, seq.num_computed)
        if known.kept_at:
            self._name_states(self.strategy.table(seq.seq_id).kept, known.digests[known.kept_at // self.block - 1])

    def ended(self, seq: Any) -> None:
        self._known.pop(seq.seq_id, None)

    def foretell(self, seq: Any, time_s: float) -> None:
        """Nothing is done with it."""

    def make_room(self, *, urgent: bool, but: Any = None, idle: bool = False) -> bool:
        """False: cached blocks are free blocks already."""
        return False

    def check(self) -> None:
        """Raise AssertionError where the books do not add up."""
        self.strategy.check_integrity()

    # -- names -----------------------------------------------------------------------------------------------------

    def _moves(self, seq_id: int, tokens: int) -> None:
        """The request has computed, or is about to compute, so many tokens of its blocks: name what is whole."""
        known = self._known.get(seq_id)
        if known is None:
            return
        table, groups, pool = self.strategy.table(seq_id), len(self._kv), self.strategy.pool
        whole = tokens // self.block
        digests = self._digests(known, whole)
        for at in range(table.named // groups, whole):
            for group, block in zip(self._kv, table.kv[at * groups : (at + 1) * groups]):
                pool.name(block, (group, digests[at]))
            if self.sparse:
                self._note(known, at, table.kv[at * groups], self.block)
        table.named = max(table.named, whole * groups)
        if tokens != self.strategy.num_tokens(seq_id):
            return
        if self.sparse:
            self._moves_sparse(known, tokens)
        elif whole and tokens % self.block == 0:
            self._name_states(table.states, digests[whole - 1])

    def _moves_sparse(self, known: _Known, tokens: int) -> None:
        seq, table, groups = known.seq, self.strategy.table(known.seq.seq_id), len(self._kv)
        whole, tail = divmod(tokens, self.block)
        if tail >= self.unit:  # a part of a block can be copied
            blocks = table.kv[whole * groups : (whole + 1) * groups]
            digest = self._digest_at(known, tokens // self.unit * self.unit)
            for group, block in zip(self._kv, blocks):
                if (group, digest) not in self.strategy.pool.names[block]:
                    self.strategy.pool.name(block, (group, digest))
            self._note(known, whole, blocks[0], tail)
        if tokens > seq.prompt_len and tail == 0 and tokens > known.kept_at:
            self.strategy.keep(seq.seq_id)
            known.kept_at = tokens
        elif tokens and tokens in (seq.prompt_len // self.unit * self.unit, known.branch):
            before = known.digests[whole - 1] if whole else b""
            self._tails.setdefault(before, set()).add(tail)
            self._name_states(table.states, self._digest_at(known, tokens))
            self.strategy.room[seq.seq_id] = 0

    def _note(self, known: _Known, at: int, block: int, count: int) -> None:
        before = known.digests[at - 1] if at else b""
        tokens = known.seq.tokens(at * self.block, at * self.block + count)
        self._contents.setdefault(before, {})[block] = (self.strategy.pool.taken[block], tokens.copy())

    def _name_states(self, blocks: list[int], digest: bytes) -> None:
        pool = self.strategy.pool
        for group, block in enumerate(blocks):
            if not pool.names[block]:
                pool.name(block, (group, digest))
                self._fresh.add(digest)
