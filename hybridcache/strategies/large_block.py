"""large_block: lmdeploy's manager block and kernel block (PR 4421), made large enough for a recurrent state.

Layer-major, as lmdeploy keeps its cache: a manager block of ``manager_block_size`` tokens is a page in the tensor of every
attention layer. The page holds kernel blocks of a power of two of tokens, ``[kernel block][K|V][token][head][dim]``; with
``manager_block_size`` a multiple of the kernel block that holds one layer's state, a manager block holds the states of as
many linear layers as there are attention layers. A plain block manager hands out the ids: no null block, and a watermark at
admission.

In lmdeploy 0.18.0 the states still live in slots of their own; this is what the pull request's decoupling makes possible.
"""

from typing import Any, ClassVar

from hybridcache.errors import bad, number
from hybridcache.spec import CacheSpec, round_up
from hybridcache.strategies.layer_major import LayerMajor

MIN_KERNEL_BLOCK = 16


class LargeBlock(LayerMajor):
    """A manager block that holds a state, with smaller kernel blocks inside.

    Args:
        manager_block_size: tokens of a manager block, a multiple of ``kernel_block_size``; by default the least that holds a
            state. (Both names are the pull request's.)
        kernel_block_size: tokens of a kernel block, a power of two from 16.
        watermark: fraction of the blocks that admission leaves free; growth may take them.
        placement_seed: shuffle the free blocks first (tests).
    """

    name: ClassVar[str] = "large_block"
    supports_physical: ClassVar[bool] = True

    def __init__(
        self, spec: CacheSpec, budget_bytes: int, *, manager_block_size: int | None = None,
        kernel_block_size: int = MIN_KERNEL_BLOCK, watermark: float = 0.0, placement_seed: int | None = None,
        **common: Any,
    ) -> None:  # fmt: skip
        super().__init__(spec, budget_bytes, **common)
        fix = "give a fraction of the pool from 0 up to, not including, 1"
        if number("watermark", watermark, fix=fix) >= 1.0:
            raise bad("watermark", watermark, fix)
        self._set_up_blocks(
            block_tokens=_block_tokens(spec, manager_block_size, kernel_block_size, self.physical),
            kernel_block_tokens=kernel_block_size,
            group_size=len(spec.attention_layers),
            watermark=watermark,
            placement_seed=placement_seed,
        )


def _block_tokens(spec: CacheSpec, asked: int | None, kernel: int, physical: bool) -> int:
    """The manager block's tokens, checked."""
    if not isinstance(kernel, int) or kernel < MIN_KERNEL_BLOCK or kernel & (kernel - 1):
        raise bad("kernel_block_size", kernel, f"give a power of two from {MIN_KERNEL_BLOCK}")
    state = spec.stored_state_bytes_per_layer if physical else spec.state_bytes_per_layer
    least = round_up(-(-state // spec.kv_bytes_per_token_per_layer), kernel)
    if asked is None:
        return least
    if not isinstance(asked, int) or asked < 1 or asked % kernel:
        raise bad("manager_block_size", asked, f"give a multiple of kernel_block_size={kernel}")
    if asked < least:
        raise bad("manager_block_size", asked, f"a state of {state} B needs at least {least} tokens")
    return asked
