"""LayerMajor: the block manager that engines with layer-major tensors share; base of padded_page and large_block.

There are ``G`` tensors (``group_size``) of ``N`` pages. A block id names page ``id`` of every tensor, ``G * page_bytes`` bytes
in all. Layers of one type are dealt into groups of at most ``G``; a group of attention layers takes a block id for every
``block_tokens`` tokens, a group of linear layers takes one block id for its states. Layer number ``j`` of a type with ``g``
groups is in group ``j % g`` and in tensor ``j // g``.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hybridcache.errors import bad
from hybridcache.memory.free_list import FreeList
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.strategies.base import Held, Kind, Span, Strategy


@dataclass
class _Request:
    states: list[int]
    """One block id per group of linear layers."""
    state_table: array
    """The block id of every linear layer."""
    kv: array = field(default_factory=lambda: array("i"))
    """One block id per group of attention layers and ``block_tokens`` tokens."""


class LayerMajor(Strategy):
    """See the module. A subclass calls :meth:`_cut` at the end of its constructor."""

    def _cut(
        self,
        *,
        block_tokens: int,
        kernel_block_tokens: int,
        group_size: int,
        null_blocks: int = 0,
        watermark: float = 0.0,
        placement_seed: int | None = None,
    ) -> None:
        """Cut the budget into blocks.

        Args:
            block_tokens: tokens of KV in one page.
            kernel_block_tokens: tokens of one kernel block; divides ``block_tokens``.
            group_size: tensors, ``G``.
            null_blocks: blocks at the start that are never handed out.
            watermark: fraction of all blocks that stays free at admission.
            placement_seed: shuffle the free blocks first (tests).
        """
        spec, budget_bytes = self.spec, self.budget_bytes
        if not 0.0 <= watermark < 1.0:
            raise bad("watermark", watermark, "give a fraction of the pool from 0 up to, not including, 1")
        self.block_tokens = block_tokens
        self.kernel_block_tokens = kernel_block_tokens
        self.page_bytes = block_tokens * spec.kv_bytes_per_token_per_layer
        self.group_size = group_size
        self.attention_groups = -(-len(spec.attention_layers) // group_size)
        self.state_groups = -(-len(spec.state_layers) // group_size)
        if self.physical and self.attention_groups > 1:
            raise bad(
                "spec",
                spec.model_type,
                f"its {len(spec.attention_layers)} attention layers make {self.attention_groups} groups with a block table "
                f"each, and kernels read one; build {self.name} with physical=False",
            )
        self.num_blocks = budget_bytes // self.block_bytes
        """All blocks, null blocks included."""
        self._null_blocks = null_blocks
        self._watermark_blocks = int(watermark * self.num_blocks)
        usable = max(self.num_blocks - null_blocks, 0)
        self._free = FreeList(usable, first=null_blocks, placement_seed=placement_seed)
        self._requests: dict[int, _Request] = {}
        self._state_blocks = 0
        self._kv_blocks = 0
        need = null_blocks + self.state_groups + self.attention_groups
        self._require_one_request((int(need / (1.0 - watermark)) + 1 if watermark else need) * self.block_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes that one block id names: a page in every tensor."""
        return self.group_size * self.page_bytes

    def _entries(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens) * self.attention_groups

    def _admit(self, seq_id: int, num_tokens: int, prompt_tokens: int) -> bool:
        if self._entries(prompt_tokens) + self.state_groups > len(self._free) - self._watermark_blocks:
            return False
        states = self._free.take(self.state_groups)
        request = _Request(states, array("i", [states[j % len(states)] for j in range(len(self.spec.state_layers))]))
        self._requests[seq_id] = request
        self._state_blocks += self.state_groups
        self._append(request, self._entries(num_tokens))
        return True

    def _grow(self, seq_id: int, num_tokens: int) -> bool:
        request = self._requests[seq_id]
        more = self._entries(num_tokens) - len(request.kv)
        if more > len(self._free):
            return False
        self._append(request, more)
        return True

    def _room(self, seq_id: int) -> int:
        return len(self._requests[seq_id].kv) // self.attention_groups * self.block_tokens

    def _append(self, request: _Request, blocks: int) -> None:
        request.kv.extend(self._free.take(blocks))
        self._kv_blocks += blocks
        self.table_entries_appended += blocks

    def _release(self, seq_id: int) -> None:
        request = self._requests.pop(seq_id)
        self._free.put_all(request.kv)
        self._free.put_all(request.states)
        self._kv_blocks -= len(request.kv)
        self._state_blocks -= len(request.states)

    def _held(self) -> Held:
        return Held(state=self._state_blocks * self.block_bytes, kv=self._kv_blocks * self.block_bytes)

    def _reserved(self) -> int:
        return self.budget_bytes - (self.num_blocks - self._null_blocks) * self.block_bytes

    def _request_limit(self) -> int:
        blocks = self.num_blocks - self._null_blocks - self._watermark_blocks - self.state_groups
        return max(blocks, 0) // self.attention_groups * self.block_tokens

    def spans(self) -> Iterator[Span]:
        tensor_bytes, page = self.num_blocks * self.page_bytes, self.page_bytes
        for seq_id, request in self._requests.items():
            for kind, blocks in ((Kind.STATE, request.states), (Kind.KV, request.kv)):
                for block in blocks:
                    for tensor in range(self.group_size):
                        yield Span(tensor * tensor_bytes + block * page, page, kind, seq_id)

    def _check(self) -> None:
        held = [block for request in self._requests.values() for block in (*request.states, *request.kv)]
        everything = held + list(self._free)
        assert len(everything) == self.num_blocks - self._null_blocks, "a block is lost or has two owners"
        assert set(everything) == set(range(self._null_blocks, self.num_blocks)), "a block is lost or has two owners"
        for seq_id, request in self._requests.items():
            assert len(request.kv) == self._entries(self._tokens[seq_id])
            assert len(request.states) == self.state_groups

    # -- physical memory -------------------------------------------------------------------------------------------

    def _kv_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].kv

    def _state_table(self, seq_id: int) -> Sequence[int]:
        return self._requests[seq_id].state_table

    def _layout(self) -> Layout:
        tensor_bytes = self.num_blocks * self.page_bytes
        return Layout(
            pool_bytes=self.group_size * tensor_bytes,
            attention=attention_layout(
                self.spec,
                base=tuple(i * tensor_bytes for i in range(len(self.spec.attention_layers))),
                tokens_per_entry=self.block_tokens,
                kernel_block_tokens=self.kernel_block_tokens,
                manager_stride=self.page_bytes,
                kernel_stride=self.kernel_block_tokens * self.spec.kv_bytes_per_token_per_layer,
            ),
            state=state_layout(
                self.spec,
                base=tuple(j // self.state_groups * tensor_bytes for j in range(len(self.spec.state_layers))),
                stride=self.page_bytes,
            ),
        )
