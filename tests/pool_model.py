"""A small model for engine tests whose every logit depends on bytes that it reads back from the pool.

It keeps whole numbers in float64, so that its tokens are exact in any batch: each layer's K and V are hashes of token,
position and layer; each state is a running hash of the request's tokens, its conv ring holds the latest ones. What it
returns is a hash of the whole context's KV, of the states and of the rings, all read through tables and layout.
"""

from bisect import bisect_left
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from hybridcache.engine.step import Shape
from hybridcache.errors import UserError
from hybridcache.kernels.backend import Caches
from hybridcache.kernels.batch import StepBatch
from hybridcache.memory.layout import Layout
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import Strategy

PRIME = 1_000_003


def pool_spec(state_layers: int = 6, attention_layers: int = 2) -> CacheSpec:
    """Every fourth layer is attention, as in Qwen3-Next; 192 B of KV per token, 512 B per state."""
    state = RecurrentState((2, 2, 4), "float64", conv_channels=16, conv_kernel=4, conv_dtype="float64")
    attention = AttentionKV(num_kv_heads=2, k_dim=2, v_dim=4, dtype="float64")
    every = (state_layers + attention_layers) // attention_layers
    layers = tuple(
        LayerSpec(i, attention if i % every == every - 1 else None, None if i % every == every - 1 else state)
        for i in range(state_layers + attention_layers)
    )
    return CacheSpec("qwen3_next", layers)


class PoolModel:
    """See the module. ``before_forward`` is called with every batch and may raise."""

    def __init__(self, vocab_size: int = 101, before_forward: Callable[[StepBatch], None] | None = None) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.dtype = torch.float64
        self.device = torch.device("cpu")
        self.waits = None
        self.weight_bytes = 0
        self.before_forward = before_forward
        self.batches: list[Shape] = []
        """Of every step, padding included."""

    def scratch_bytes(self, tokens: int, rows: int, prefilling: int) -> int:
        return 0

    def forward(self, batch: StepBatch, caches: Caches) -> torch.Tensor:
        if (batch.kv_table_BN[:, 0] < 0).all():  # nothing but padding: a warm-up
            wanted = batch.num_tokens if batch.logit_index_R is None else len(batch.logit_index_R)
            return torch.zeros(wanted, self.config.vocab_size, dtype=torch.float64)
        self.batches.append(
            Shape(batch.num_decode, batch.num_tokens - batch.num_decode, batch.num_rows - batch.num_decode)
        )
        if self.before_forward is not None:
            self.before_forward(batch)
        buffer, layout = caches.buffer, caches.layout
        memory = buffer.numpy()[: buffer.numel() // 8 * 8].view(np.float64)
        tokens, positions = batch.token_ids_T.numpy(), batch.position_T.numpy()
        rows = batch.row_T.numpy()
        last = {}
        for row in range(batch.num_rows):
            if batch.kv_table_BN[row, 0] < 0:  # padding
                continue
            mine = np.flatnonzero(rows == row)
            self._check_row(batch, row, mine, positions)
            kv_hash = self._attend(
                memory,
                layout,
                batch.kv_table_BN[row].numpy(),
                tokens[mine],
                positions[mine],
                int(batch.context_len_B[row]),
            )
            tables = (batch.state_read_BL[row].tolist(), batch.state_write_BL[row].tolist())
            kept = self._kept(batch, row, positions[mine])
            state_hash = self._recur(memory, layout, tables, tokens[mine], positions[mine], kept)
            last[int(mine[-1])] = (7 * kv_hash + 13 * state_hash) % PRIME
        wanted = range(batch.num_tokens) if batch.logit_index_R is None else batch.logit_index_R
        hashes = np.array([last.get(int(index), 0.0) for index in wanted])
        factors = np.arange(1, self.config.vocab_size + 1) * 7919.0 % PRIME
        return torch.from_numpy((hashes[:, None] + 1) * factors % PRIME / PRIME * 8)

    @staticmethod
    def _check_row(batch: StepBatch, row: int, mine: np.ndarray, positions: np.ndarray) -> None:
        """The batch tells in several ways which tokens a row has; kernels read one or another."""
        first, count = row, 1
        if row >= batch.num_decode:
            number = row - batch.num_decode
            begin, end = batch.prefill_cu_seqlens[number : number + 2].tolist()
            first, count = batch.num_decode + begin, end - begin
            assert int(batch.prefill_start_P[number]) == positions[first]
        assert mine.tolist() == list(range(first, first + count))
        assert positions[mine].tolist() == list(range(positions[first], positions[first] + count))
        assert int(batch.context_len_B[row]) == positions[first] + count

    def _attend(
        self,
        memory: np.ndarray,
        layout: Layout,
        table: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
        context_len: int,
    ) -> float:
        """Store the new tokens' KV, then hash the KV of the whole context."""
        kv = layout.attention
        total = 0.0
        context = np.arange(context_len)
        for layer in range(len(kv.base)):
            for which, dim in ((0, kv.k_dim), (1, kv.v_dim)):
                for head in range(kv.num_kv_heads):
                    # The first and the last element of the row, so that its whole extent matters.
                    for element in (0, dim - 1):
                        salt = 1 + element + 10 * head + 100 * which + 1000 * layer
                        memory[self._rows(kv, layer, table, positions, which, head) + element] = (
                            (tokens + 3) * (positions + 5) * salt % PRIME
                        )
                        read = memory[self._rows(kv, layer, table, context, which, head) + element]
                        total = (total * 31 + (read * (context % 97 + 1) % PRIME).sum()) % PRIME
        return total

    @staticmethod
    def _kept(batch: StepBatch, row: int, positions: np.ndarray) -> dict[int, list[int]]:
        """The state entries of the row's checkpoints inside this step, by position."""
        table, interval = batch.checkpoint_table_PNL, batch.checkpoint_interval
        if table is None or row < batch.num_decode:
            return {}
        first = positions[0] // interval + 1
        entries = table[row - batch.num_decode].tolist()
        return {
            (first + n) * interval: entry
            for n, entry in enumerate(entries)
            if entry[0] >= 0 and (first + n) * interval <= positions[-1] + 1
        }

    @staticmethod
    def _rows(kv, layer: int, table: np.ndarray, positions: np.ndarray, which: int, head: int) -> np.ndarray:
        entries = table[positions // kv.tokens_per_entry].astype(np.int64)
        assert (entries >= 0).all(), "a token has no table entry"
        address = (
            kv.base[layer]
            + entries * kv.manager_stride
            + positions % kv.tokens_per_entry // kv.kernel_block_tokens * kv.kernel_stride
            + which * kv.kv_stride
            + positions % kv.kernel_block_tokens * kv.token_stride[which]
            + head * kv.head_stride[which]
        )
        return address // 8

    def _recur(
        self,
        memory: np.ndarray,
        layout: Layout,
        tables: tuple[list[int], list[int]],
        tokens: np.ndarray,
        positions: np.ndarray,
        checkpoints: dict[int, list[int]] | None = None,
    ) -> float:
        """Update each layer's running hash and ring; hash what they hold then.

        Args:
            tables: entries that states are read from, and those that they are written to (equal ones: in place). At position 0
                nothing is read.
            checkpoints: by position the entries that the states before it go to as well.
        """
        st, total = layout.state, 0.0
        words = (st.conv_offset + st.conv_kernel * st.conv_channels * 8) // 8
        last = int(np.prod(st.recurrent_shape)) - 1
        for layer, (read, write) in enumerate(zip(*tables, strict=True)):
            source, base = (st.address(layer, entry) // 8 for entry in (read, write))
            if source != base and positions[0] > 0:
                memory[base : base + words] = memory[source : source + words]
            ring = base + st.conv_offset // 8
            for token, position in zip(tokens, positions):
                for slot in (base, base + last):
                    previous = memory[slot] if position > 0 else 0.0
                    memory[slot] = (previous * 31 + token + layer + 1) % PRIME
                # The last channel of the column.
                memory[ring + (position % st.conv_kernel + 1) * st.conv_channels - 1] = token + 1
                if checkpoints and position + 1 in checkpoints:
                    kept = st.address(layer, checkpoints[position + 1][layer]) // 8
                    memory[kept : kept + words] = memory[base : base + words]
            seen = range(max(int(positions[-1]) - st.conv_kernel + 1, 0), int(positions[-1]) + 1)
            columns = sum(
                (i + 1) * memory[ring + (p % st.conv_kernel + 1) * st.conv_channels - 1] for i, p in enumerate(seen)
            )
            total = (total * 17 + memory[base] + 3 * memory[base + last] + columns) % PRIME
        return total


BUDGETS = [int(1024 * 1.01**i) for i in range(1400)]


def smallest_budget(make: Callable[[int], Strategy], tokens: int) -> int:
    """A budget at which a strategy holds one request of ``tokens`` tokens and one of 1 % less does not."""

    def holds(budget: int) -> bool:
        try:
            return make(budget).request_limit() >= tokens
        except UserError as error:
            if "cannot hold one request" not in str(error):
                raise
            return False

    at = bisect_left(BUDGETS, True, key=holds)
    assert at < len(BUDGETS), f"no budget up to {BUDGETS[-1]} holds {tokens} tokens"
    return BUDGETS[at]
