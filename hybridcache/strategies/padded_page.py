"""padded_page: vLLM's rule (0.25.1). The attention block grows until its page holds a padded state.

* Block of ``A = 16 * ceil(s / (16 * k))`` tokens, with ``s`` the bytes of one layer's state and ``k`` those of one token's KV
  in one layer; page ``P = A * k``; the state is padded to ``P``.
* Layers of one type are dealt into groups of as many layers as the rarer type has (of the more frequent one's where that
  has less than 1.5 times as many). One block id is a page in each tensor; block 0 is the null block.
* A request of ``L`` tokens holds ``ceil(L / A)`` blocks per attention group and one per linear group.
* Admission asks for the whole prompt's blocks, but only the chunk's are allocated; nothing is reserved for output.

A page is one kernel block, ``[K|V][A tokens][head][dim]``, as vLLM keeps it for FlashAttention. Where the page has no slack
for the last column of the conv ring, a physical pool grows ``A`` by 16.
"""

from typing import Any, ClassVar

from hybridcache.spec import CacheSpec
from hybridcache.strategies.layer_major import LayerMajor

TOKENS = 16
"""The attention block is a multiple of this."""


class PaddedPage(LayerMajor):
    """vLLM 0.25.1's blocks.

    Args:
        placement_seed: shuffle the free blocks first (tests).
    """

    name: ClassVar[str] = "padded_page"
    supports_physical: ClassVar[bool] = True
    null_blocks: ClassVar[int] = 1

    def __init__(self, spec: CacheSpec, budget_bytes: int, *, placement_seed: int | None = None, **common: Any) -> None:
        super().__init__(spec, budget_bytes, **common)
        block_tokens = padded_block_tokens(spec)
        while self.physical and block_tokens * spec.kv_bytes_per_token_per_layer < spec.stored_state_bytes_per_layer:
            block_tokens += TOKENS
        self._set_up_blocks(
            block_tokens=block_tokens,
            kernel_block_tokens=block_tokens,
            group_size=group_size(spec),
            placement_seed=placement_seed,
        )


def padded_block_tokens(spec: CacheSpec) -> int:
    """``A``: the least multiple of 16 tokens whose page holds one layer's state."""
    unit = TOKENS * spec.kv_bytes_per_token_per_layer
    return TOKENS * -(-spec.state_bytes_per_layer // unit)


def group_size(spec: CacheSpec) -> int:
    """Layers of one group, which is also the number of tensors."""
    few, many = sorted((len(spec.attention_layers), len(spec.state_layers)))
    return many if many < 1.5 * few else few
