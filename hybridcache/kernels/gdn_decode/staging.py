"""How GDN decode through shared memory is cut, and which layouts and inputs it can do."""

from dataclasses import dataclass

import torch

from hybridcache.dtypes import torch_dtype
from hybridcache.errors import bad
from hybridcache.layout import StateLayout

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
    bulk: bool = False
    """Bulk (TMA) copies in both directions; else ``cp.async`` in and ordinary stores out."""
    heads: int = 1
    """Value heads of one program: those that share a key head share its conv and norms too."""
    dependent_launch: bool = False
    """Programmatic dependent launch: the grid is set up while the kernel before it ends."""

    def __post_init__(self) -> None:
        if self.num_warps not in (1, 2, 4, 8):
            raise bad("num_warps", self.num_warps, "choose 1, 2, 4 or 8")
        for field in ("block_v", "chunks", "heads"):
            value = getattr(self, field)
            if value < 1 or value & (value - 1):
                raise bad(field, value, "choose a power of two")


def why_not(layout: StateLayout, x_BC: torch.Tensor, staging: Staging) -> str | None:
    """What keeps this kernel from a layout and inputs; None where it can do them."""
    v_heads, key_dim, value_dim = layout.recurrent_shape
    k_heads = (layout.conv_channels - v_heads * value_dim) // (2 * key_dim)
    state_dtype = torch_dtype(layout.recurrent_dtype)
    if x_BC.dtype not in (torch.bfloat16, torch.float16, torch.float32) or state_dtype == torch.float64:
        return f"{x_BC.dtype} inputs and a {layout.recurrent_dtype} state: it computes in float32"
    if any(size & (size - 1) for size in (key_dim, layout.conv_kernel)):
        return f"key dim {key_dim} and conv width {layout.conv_kernel}: both must be powers of two"
    if value_dim % staging.block_v or (v_heads // k_heads) % staging.heads:
        return f"{value_dim} value dims and {v_heads // k_heads} heads a group: not cut by {staging}"
    rows = rows_at_once(staging.block_v, state_dtype.itemsize, staging.num_warps)
    if key_dim % (staging.chunks * rows):
        return f"key dim {key_dim}: {staging.chunks} chunks of rows that are read {rows} at a time"
    row_bytes = value_dim * state_dtype.itemsize
    if layout.stride % row_bytes or staging.block_v * state_dtype.itemsize < COPIED_BYTES:
        return f"state stride {layout.stride} with rows of {row_bytes} B: no tiles of whole rows"
    return None


def rows_at_once(block_v: int, itemsize: int, num_warps: int) -> int:
    """Rows of a tile that one access of all threads covers."""
    lanes = min(32, block_v * itemsize // COPIED_BYTES)
    return 32 // lanes * num_warps
