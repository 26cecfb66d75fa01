"""How GDN decode is cut for a number of rows, a state dtype and a device.

Measured at the shape of Qwen3-Next on an H100, at 1, 8, 64 and 256 rows (three rounds: ``docs/LOG.md``).
Few rows do not fill the device, so small tiles make more programs of them; many rows
want whole heads, whose bytes are contiguous, and as many of them on a multiprocessor as fit. In float32 registers hold as
much state as shared memory; in bfloat16 half as much.
"""

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from hybridcache.errors import bad
from hybridcache.kernels.devices import capability
from hybridcache.kernels.gdn_decode.staging import Staging, why_not
from hybridcache.memory.layout import StateLayout
from hybridcache.spec.dtypes import torch_dtype

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """How a launch of ``triton.py`` is cut and compiled; the result is the same up to rounding.

    Raises:
        UserError: ``block_v`` is no power of two of 4 or more, or ``num_warps`` none of 1, 2, 4, 8.
    """

    block_v: int
    """Value dims of one program at most."""
    num_warps: int
    evict_first: bool = False
    """Tell the L2 cache that the state is not read again soon."""
    max_registers: int | None = None
    """Registers of a thread at most; None leaves it to the assembler."""
    dependent_launch: bool = False
    """Programmatic dependent launch: the grid is set up while the kernel before it ends (Hopper and later)."""
    conv_first: bool = False
    """The conv's loads go out before the state's, so that its arithmetic does not wait for the last of them."""

    def __post_init__(self) -> None:
        if self.block_v < 4 or self.block_v & (self.block_v - 1):
            raise bad("block_v", self.block_v, "choose a power of two from 4 on")
        if self.num_warps not in (1, 2, 4, 8):
            raise bad("num_warps", self.num_warps, "choose 1, 2, 4 or 8")


VERY_FEW_ROWS, FEW_ROWS = 2, 16
"""Up to the first many rows states stay in the L2 cache from step to step; up to the second many they don't, but do not fill
the device either."""
STAGED_ROWS = {4: 64, 2: 32}
"""From this many rows on, by bytes of a state's element, states pass through shared memory."""


def in_registers(rows: int, state_dtype: torch.dtype) -> Tuning:
    """The cut of ``triton.py``, which can do any shape."""
    if rows <= VERY_FEW_ROWS:
        return Tuning(32, 1, dependent_launch=True)
    if rows <= FEW_ROWS:
        return Tuning(32, 1, dependent_launch=True, evict_first=True, conv_first=state_dtype.itemsize == 2)
    return Tuning(64, 2, dependent_launch=True)


def default_tuning(rows: int, state_dtype: torch.dtype) -> Tuning | Staging:
    """The fastest cut on a Hopper GPU of those measured."""
    if rows >= STAGED_ROWS.get(state_dtype.itemsize, rows + 1):
        wide = state_dtype.itemsize == 4
        return Staging(128, 4, chunks=8 if wide else 4, dependent_launch=True, evict_first=wide)
    return in_registers(rows, state_dtype)


def choose(layout: StateLayout, x_BC: torch.Tensor) -> Tuning | Staging:
    """:func:`default_tuning` where the device, the layout and the inputs allow it; else a cut in registers, and the reason is
    logged once. Dependent launch and the copies of ``hopper.py`` take compute capability 9.0 or later."""
    rows, state_dtype = x_BC.shape[0], torch_dtype(layout.recurrent_dtype)
    tuning, capable = default_tuning(rows, state_dtype), capability(x_BC.device) >= (9, 0)
    if isinstance(tuning, Staging):
        reason = (
            why_not(layout, x_BC.dtype, tuning) if capable else f"{x_BC.device}: no compute capability of 9.0 or later"
        )
        if reason is not None:
            _say_once(reason)
            tuning = in_registers(rows, state_dtype)
    return tuning if capable else replace(tuning, dependent_launch=False)


@lru_cache
def _say_once(reason: str) -> None:
    _LOG.warning("GDN decode keeps states in registers, not in shared memory: %s", reason)
