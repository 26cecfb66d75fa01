"""A model of what kernels keep in a physical pool: a stamp for every KV row and every state, in a numpy buffer.

Every token that a step writes has a number of its own, and the state after it bears that number, so that owners that share a
prefix must find the same stamps there. The addresses are computed here from the layout's documented formula and the block
tables, not by the package's helpers.
"""

from collections.abc import Collection, Iterator
from random import Random

import numpy as np

from hybridcache.spec.dtypes import itemsize
from hybridcache.strategies import Strategy

WORD = 8
POISON = -1
"""All bits set: NaN in every element type."""


class Contents:
    """The bytes of one pool, and what they must be. The caller tells what it did; ``rng`` orders the rows of a step."""

    def __init__(self, strategy: Strategy, rng: Random | None = None) -> None:
        self.strategy = strategy
        self.layout = strategy.layout
        self.rng = rng or Random(0)
        assert self.layout.pool_bytes <= strategy.pool_bytes <= strategy.budget_bytes
        self.words = np.full(-(-self.layout.pool_bytes // WORD), POISON, dtype=np.int64)
        self.running: dict[int, list[int]] = {}
        """Numbers of the tokens of each resident that a step has written."""
        self.cached: dict[int, list[int]] = {}
        """As much, of each cached owner."""
        self.reserved: dict[int, tuple[int, int]] = {}
        """Resident and position of cached owners whose states the next step writes."""
        self._next = 0

    # -- what the caller did ---------------------------------------------------------------------------------------

    def admitted(self, seq_id: int) -> None:
        self.running[seq_id] = []

    def released(self, seq_id: int) -> None:
        del self.running[seq_id]
        assert all(writer != seq_id for writer, _ in self.reserved.values()), "nobody writes what was reserved"

    def checkpointed(self, seq_id: int, key: int) -> None:
        assert len(self.running[seq_id]) == self.strategy.num_tokens(seq_id)
        self.cached[key] = list(self.running[seq_id])

    def reserve(self, seq_id: int, key: int, position: int) -> None:
        assert len(self.running[seq_id]) < position <= self.strategy.num_tokens(seq_id)
        self.reserved[key] = (seq_id, position)

    def restored(self, seq_id: int, key: int) -> None:
        self.running[seq_id] = list(self.cached[key])

    def forked(self, seq_id: int, child: int) -> None:
        self.running[child] = list(self.running[seq_id])

    def dropped(self, key: int) -> None:
        self.cached.pop(key, None)
        self.reserved.pop(key, None)

    # -- a step ----------------------------------------------------------------------------------------------------

    def step(self, launched: Collection[int] | None = None) -> int:
        """What an engine does in a step: relocate, check all that was kept, and let the launched requests (all by default) read
        their states, write their new tokens and their states, in any order. Returns the bytes relocated."""
        moved = self._relocate()
        self._check_tables()
        self._verify()
        self._poison_free_bytes()
        self._verify()
        rows = [*(self.running if launched is None else launched)]
        self.rng.shuffle(rows)
        for seq_id in rows:
            self._run(seq_id)
        self.strategy.settle_states()
        assert not self.strategy._reads
        self._verify()
        return moved

    def _run(self, seq_id: int) -> None:
        tokens, total = self.running[seq_id], self.strategy.num_tokens(seq_id)
        kv = self.strategy.kv_table(seq_id)
        if tokens:
            self._expect(self._states(tokens, self.strategy.state_read_table(seq_id)), f"state read by {seq_id}")
            self._expect(self._kv(tokens, kv, 0), f"KV of request {seq_id}")
        start = len(tokens)
        tokens += range(self._next, self._next + total - start)
        self._next += total - start
        if total > start:
            self._put(self._kv(tokens, kv, start))
            self._put(self._states(tokens, self.strategy.state_write_table(seq_id)))
        for key in [key for key, (writer, _) in self.reserved.items() if writer == seq_id]:
            _, position = self.reserved.pop(key)
            self.cached[key] = tokens[:position]
            self._put(self._states(self.cached[key], self.strategy.checkpoint_table(key)))

    def _relocate(self) -> int:
        moved = 0
        for move in self.strategy.drain_moves():
            assert abs(move.src - move.dst) >= move.num_bytes, f"{move} overlaps itself"
            assert min(move.src, move.dst) >= 0
            assert max(move.src, move.dst) + move.num_bytes <= self.layout.pool_bytes
            src, dst, count = (value // WORD for value in (move.src, move.dst, move.num_bytes))
            self.words[dst : dst + count] = self.words[src : src + count]
            moved += move.num_bytes
        return moved

    def _check_tables(self) -> None:
        kv, *states = vars(self.strategy.tables(tuple(self.running))).values()
        for state in states:
            assert kv.dtype == state.dtype == np.int32
            assert state.shape == (len(self.running), len(self.strategy.spec.state_layers))
            assert state.size == 0 or state.min() >= 0
        for row, seq_id in enumerate(self.running):
            entries = -(-self.strategy.num_tokens(seq_id) // self.layout.attention.tokens_per_entry)
            assert (kv[row, :entries] >= 0).all(), f"request {seq_id}: an entry below 0 in {kv[row]}"
            assert (kv[row, entries:] == -1).all(), f"request {seq_id}: more than {entries} entries in {kv[row]}"

    def _poison_free_bytes(self) -> None:
        end = 0
        for span in sorted(self.strategy.spans(), key=lambda span: span.offset):
            self.words[end // WORD : span.offset // WORD] = POISON
            end = span.offset + span.num_bytes
        self.words[end // WORD :] = POISON

    def _verify(self) -> None:
        """Everything that was written and is owned is where the tables say."""
        for seq_id, tokens in self.running.items():
            if tokens:
                self._expect(self._kv(tokens, self.strategy.kv_table(seq_id), 0), f"KV of request {seq_id}")
                self._expect(self._states(tokens, self.strategy.state_read_table(seq_id)), f"state of request {seq_id}")
        for key, tokens in self.cached.items():
            self._expect(self._kv(tokens, key_entries(self.strategy, key), 0), f"KV of key {key}")
            self._expect(self._states(tokens, self.strategy.checkpoint_table(key)), f"state of key {key}")

    def _expect(self, pieces: Iterator[tuple[np.ndarray, np.ndarray]], what: str) -> None:
        for address, expected in pieces:
            assert (self.words[address] == expected).all(), f"{what} was overwritten"

    def _put(self, pieces: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        for address, stamp in pieces:
            self.words[address] = stamp

    def _kv(self, tokens: list[int], row, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Word indices and stamps of rows ``[layer, position, head, word]``, first of K, then of V."""
        at, row = self.layout.attention, np.array(row)
        p = np.arange(start, len(tokens))[None, :, None, None]
        number = np.array(tokens[start:])[None, :, None, None]
        layer = np.arange(len(at.base))[:, None, None, None]
        head = np.arange(at.num_kv_heads)[None, None, :, None]
        inside = p % at.tokens_per_entry
        paged = (
            np.array(at.base)[:, None, None, None]
            + row[p // at.tokens_per_entry].astype(np.int64) * at.manager_stride
            + inside // at.kernel_block_tokens * at.kernel_stride
        )
        for kv, dim in enumerate((at.k_dim, at.v_dim)):
            word = np.arange(dim * itemsize(at.dtype) // WORD)[None, None, None, :]
            address = (
                paged
                + kv * at.kv_stride
                + p % at.kernel_block_tokens * at.token_stride[kv]
                + head * at.head_stride[kv]
                + word * WORD
            )
            stamp = ((number * 64 + layer) * 2 + kv) * 64 + head * 8 + word
            yield address // WORD, np.broadcast_to(stamp, address.shape)

    def _states(self, tokens: list[int], row) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Word indices and stamps ``[layer, word]`` of the recurrent parts and of the conv rings, which every step changes."""
        st, state = self.layout.state, self.strategy.spec.state
        assert state is not None
        layer = np.arange(len(st.base))[:, None]
        entries = np.broadcast_to(np.array(row, dtype=np.int64), len(st.base))
        start = np.array(st.base)[:, None] + entries[:, None] * st.stride
        assert (start % 128 == 0).all(), "a state starts off 128 bytes"
        for part, (offset, num_bytes) in enumerate(((0, state.recurrent_bytes), (st.conv_offset, state.ring_bytes))):
            word = np.arange(num_bytes // WORD)[None, :]
            stamp = -2 - ((tokens[-1] * 64 + layer) * 2 + part) * 8192 - word
            yield (start + offset) // WORD + word, stamp


def key_entries(strategy: Strategy, key: int) -> list[int]:
    """The KV entries of a cached owner, in order of position."""
    path = [*strategy._checkpoints[key].kv.path()]
    return [entry for segment in reversed(path) for entry in segment.entries]
