"""How GDN decode through shared memory is cut, and which layouts and inputs it can do."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from hybridcache.errors import bad
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import torch_dtype

COPIED_BYTES = 16
"""Of one thread's access to a tile."""


@dataclass(frozen=True)
class Staging:
    """How a launch is cut; the result is the same up to rounding.

    Raises:
        UserError: ``num_warps`` is none of 1, 2, 4, 8, or ``block_v`` or ``chunks`` is no power of two.
    """

    block_v: int
    """Value dims of one program."""
    num_warps: int
    chunks: int = 4
    """Parts of a tile, along the key dims, that are copied and waited for one by one."""
    evict_first: bool = False
    """Tell the L2 cache that the stored state is not read again soon (Triton gives ``cp.async`` no such hint)."""
    dependent_launch: bool = False
    """Programmatic dependent launch: the grid is set up while the kernel before it ends."""

    def __post_init__(self) -> None:
        if self.num_warps not in (1, 2, 4, 8):
            raise bad("num_warps", self.num_warps, "choose 1, 2, 4 or 8")
        for field in ("block_v", "chunks"):
            value = getattr(self, field)
            if value < 1 or value & (value - 1):
                raise bad(field, value, "choose a power of two")


@lru_cache
def why_not(layout: StateLayout, dtype: torch.dtype, staging: Staging) -> str | None:
    """What keeps this kernel from a layout and inputs of a dtype; None where it can do them."""
    _, key_dim, value_dim = layout.recurrent_shape
    state_dtype = torch_dtype(layout.recurrent_dtype)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or state_dtype == torch.float64:
        return f"{dtype} inputs and a {layout.recurrent_dtype} state: it computes in float32"
    if any(size & (size - 1) for size in (key_dim, layout.conv_kernel)):
        return f"key dim {key_dim} and conv width {layout.conv_kernel}: both must be powers of two"
    if value_dim % staging.block_v:
        return f"{value_dim} value dims: no multiple of the {staging.block_v} of a program"
    if staging.block_v * state_dtype.itemsize < COPIED_BYTES:
        return f"{staging.block_v} value dims: shorter than a copy of {COPIED_BYTES} B"
    rows = rows_at_once(staging, state_dtype.itemsize)
    if key_dim % (staging.chunks * rows):
        return f"key dim {key_dim}: {staging.chunks} chunks of rows that are read {rows} at a time"
    if any(address % COPIED_BYTES for address in (layout.stride, *layout.base)):
        return f"states at {layout.base} + n * {layout.stride}: not aligned to copies of {COPIED_BYTES} B"
    return None


def rows_at_once(staging: Staging, itemsize: int) -> int:
    """Rows of a tile that one access of all threads covers."""
    lanes = min(32, staging.block_v * itemsize // COPIED_BYTES)
    return 32 // lanes * staging.num_warps
