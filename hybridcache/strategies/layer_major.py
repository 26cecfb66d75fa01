"""LayerMajor: the block manager that engines with layer-major tensors share; base of padded_page and large_block.

There are ``G`` tensors (``group_size``) of ``N`` pages. A block id names page ``id`` of every tensor, ``G * page_bytes`` bytes
in all. Layers of one type are dealt into groups of at most ``G``; a group of attention layers takes a block id for every
``block_tokens`` tokens, a group of linear layers takes one block id for its states. Layer number ``j`` of a type with ``g``
groups is in group ``j % g`` and in tensor ``j // g``.
"""

from array import array
from collections.abc import MutableSequence, Sequence
from typing import ClassVar

from hybridcache.errors import bad
from hybridcache.memory.free_list import FreeList
from hybridcache.memory.layout import Layout, attention_layout, state_layout
from hybridcache.memory.spans import Units
from hybridcache.strategies.base import Cut, Strategy
from hybridcache.strategies.options import whole_or_none


class LayerMajor(Strategy):
    """See the module. A subclass calls :meth:`_set_up_blocks` at the end of its constructor."""

    null_blocks: ClassVar[int] = 0
    """Blocks at the start that are never handed out."""

    def _set_up_blocks(
        self, *, block_tokens: int, kernel_block_tokens: int, group_size: int, watermark: float = 0.0,
        placement_seed: int | None = None,
    ) -> None:  # fmt: skip
        """Cut the pool into blocks of ``block_tokens`` tokens, a multiple of ``kernel_block_tokens``, in ``group_size``
        tensors; the fraction ``watermark`` of all blocks stays free at admission."""
        spec = self.spec
        self.block_tokens = block_tokens
        self.kernel_block_tokens = kernel_block_tokens
        self.page_bytes = block_tokens * spec.kv_bytes_per_token_per_layer
        self.group_size = group_size
        self.attention_groups = -(-len(spec.attention_layers) // group_size)
        self.state_groups = -(-len(spec.state_layers) // group_size)
        self._watermark = watermark
        self._placement_seed = whole_or_none("placement_seed", placement_seed, 0)
        if self.physical and self.attention_groups > 1:
            raise bad(
                "spec",
                spec.model_type,
                f"its {len(spec.attention_layers)} attention layers make {self.attention_groups} groups with a block table "
                f"each, and kernels read one; build {self.name} with physical=False",
            )
        self._set_up()

    @property
    def block_bytes(self) -> int:
        """Bytes that one block id names: a page in every tensor."""
        return self.group_size * self.page_bytes

    def _cut(self, pool_bytes: int) -> Cut:
        self.num_blocks = pool_bytes // self.block_bytes
        """All blocks, null blocks included."""
        self._watermark_blocks = int(self._watermark * self.num_blocks)
        usable = max(self.num_blocks - self.null_blocks, 0)
        self._free = FreeList(usable, first=self.null_blocks, placement_seed=self._placement_seed)
        need = self.null_blocks + self.state_groups + self.attention_groups
        least = int(need / (1.0 - self._watermark)) + 1 if self._watermark else need
        pages = Units(tuple(i * self.num_blocks * self.page_bytes for i in range(self.group_size)), self.page_bytes)
        return Cut(
            state=pages, states_per_request=self.state_groups, kv=pages, entry_tokens=self.block_tokens,
            kernel_tokens=self.kernel_block_tokens, entry_units=self.attention_groups,
            least_bytes=least * self.block_bytes,
        )  # fmt: skip

    def _fits(self, entries: int, states: bool) -> bool:
        return entries + states * self.state_groups <= len(self._free)

    def _admits(self, entries: int, states: bool = True) -> bool:
        return entries + states * self.state_groups <= len(self._free) - self._watermark_blocks

    def _take_states(self) -> MutableSequence[int]:
        return self._free.take(self.state_groups)

    def _take_kv(self, entries: int, held: array) -> Sequence[int]:
        return self._free.take(entries)

    def _give_states(self, units: Sequence[int]) -> None:
        self._free.put_all(units)

    _give_kv = _give_states

    def _free_bytes(self) -> int:
        return len(self._free) * self.block_bytes

    def _reserved(self) -> int:
        return self.budget_bytes - (self.num_blocks - self.null_blocks) * self.block_bytes

    def _request_limit(self) -> int:
        blocks = self.num_blocks - self.null_blocks - self._watermark_blocks - self.state_groups
        return max(blocks, 0) // self.attention_groups * self.block_tokens

    def _check(self, states: Sequence[int], kv: Sequence[int]) -> None:
        everything = [*states, *kv, *self._free]
        assert len(everything) == self.num_blocks - self.null_blocks, "a block is lost or held twice"
        assert set(everything) == set(range(self.null_blocks, self.num_blocks)), "a block is lost or held twice"

    # -- physical memory -------------------------------------------------------------------------------------------

    def _state_table(self, units: Sequence[int]) -> Sequence[int]:
        return array("i", [units[j % len(units)] for j in range(len(self.spec.state_layers))])

    def _layout(self) -> Layout:
        bases = self.cut.kv.bases
        return Layout(
            pool_bytes=self.num_blocks * self.block_bytes,
            attention=attention_layout(
                self.spec, base=bases[: len(self.spec.attention_layers)], tokens_per_entry=self.block_tokens,
                kernel_block_tokens=self.kernel_block_tokens, manager_stride=self.page_bytes,
                kernel_stride=self.kernel_block_tokens * self.spec.kv_bytes_per_token_per_layer,
            ),
            state=state_layout(
                self.spec,
                base=tuple(bases[j // self.state_groups] for j in range(len(self.spec.state_layers))),
                stride=self.page_bytes,
            ),
        )  # fmt: skip
