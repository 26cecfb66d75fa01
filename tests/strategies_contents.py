"""A model of what kernels keep in a physical pool: a stamp for every KV row and every state, in a numpy buffer.

The addresses are computed here from the layout's documented formula and the block tables, not by the package's helpers.
"""

from collections.abc import Iterator

import numpy as np

from hybridcache.spec.dtypes import itemsize
from hybridcache.strategies import Strategy

WORD = 8
POISON = -1
"""All bits set: NaN in every element type."""


class Contents:
    """The bytes of one pool, and what they must be."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.layout = strategy.layout
        assert self.layout.pool_bytes <= strategy.budget_bytes
        self.words = np.full(-(-self.layout.pool_bytes // WORD), POISON, dtype=np.int64)
        self.written: dict[int, int] = {}
        """Tokens of each resident that a step has written."""
        self.serial: dict[int, int] = {}
        """A number of its own for each admission."""
        self._next = 0

    def admitted(self, seq_id: int) -> None:
        self._next += 1
        self.serial[seq_id] = self._next
        self.written[seq_id] = 0

    def released(self, seq_id: int) -> None:
        del self.serial[seq_id], self.written[seq_id]

    def step(self) -> int:
        """What an engine does in a step: relocate, check all that was kept, write the new tokens and every state.
        Returns the bytes relocated."""
        moved = self._relocate()
        tables = self.strategy.tables(tuple(self.written))
        self._check_tables(tables.kv, tables.state)
        for row, seq_id in enumerate(self.written):
            self._verify(seq_id, tables.kv[row], tables.state[row])
        self._poison_free_bytes()
        for row, seq_id in enumerate(self.written):
            start, stop = self.written[seq_id], self.strategy.num_tokens(seq_id)
            self._put(self._kv(seq_id, tables.kv[row], start, stop))
            self.written[seq_id] = stop
            self._put(self._states(seq_id, tables.state[row]))
        for row, seq_id in enumerate(self.written):
            self._verify(seq_id, tables.kv[row], tables.state[row])
        return moved

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

    def _check_tables(self, kv: np.ndarray, state: np.ndarray) -> None:
        assert kv.dtype == state.dtype == np.int32
        assert state.shape == (len(self.written), len(self.strategy.spec.state_layers))
        assert state.size == 0 or state.min() >= 0
        for row, seq_id in enumerate(self.written):
            entries = -(-self.strategy.num_tokens(seq_id) // self.layout.attention.tokens_per_entry)
            assert (kv[row, :entries] >= 0).all(), f"request {seq_id}: an entry below 0 in {kv[row]}"
            assert (kv[row, entries:] == -1).all(), f"request {seq_id}: more than {entries} entries in {kv[row]}"

    def _poison_free_bytes(self) -> None:
        end = 0
        for span in sorted(self.strategy.spans(), key=lambda span: span.offset):
            self.words[end // WORD : span.offset // WORD] = POISON
            end = span.offset + span.num_bytes
        self.words[end // WORD :] = POISON

    def _verify(self, seq_id: int, kv_row: np.ndarray, state_row: np.ndarray) -> None:
        written = self.written[seq_id]
        if written == 0:
            return
        for what, pieces in (("KV", self._kv(seq_id, kv_row, 0, written)), ("state", self._states(seq_id, state_row))):
            for address, expected in pieces:
                assert (self.words[address] == expected).all(), f"{what} of request {seq_id} was overwritten"

    def _put(self, pieces: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        for address, stamp in pieces:
            self.words[address] = stamp

    def _kv(self, seq_id: int, row: np.ndarray, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Word indices and stamps of rows ``[layer, position, head, word]``, first of K, then of V."""
        at = self.layout.attention
        p = np.arange(start, stop)[None, :, None, None]
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
            stamp = (((self.serial[seq_id] * 64 + layer) * 8192 + p) * 2 + kv) * 64 + head * 8 + word
            yield address // WORD, np.broadcast_to(stamp, address.shape)

    def _states(self, seq_id: int, row: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Word indices and stamps ``[layer, word]`` of the recurrent parts and of the conv rings, which every step changes."""
        st, state = self.layout.state, self.strategy.spec.state
        assert state is not None
        layer = np.arange(len(st.base))[:, None]
        start = np.array(st.base)[:, None] + row[:, None].astype(np.int64) * st.stride
        assert (start % 128 == 0).all(), "a state starts off 128 bytes"
        for part, (offset, num_bytes) in enumerate(((0, state.recurrent_bytes), (st.conv_offset, state.ring_bytes))):
            word = np.arange(num_bytes // WORD)[None, :]
            tokens = self.written[seq_id]
            stamp = -2 - (((self.serial[seq_id] * 64 + layer) * 8192 + tokens) * 2 + part) * 8192 - word
            yield (start + offset) // WORD + word, stamp
