"""Memory: states what an engine takes of its device before anything is allotted.

Peak memory is weights + cache + workspace. The workspace is everything else: the inputs of steps and the logits that graphs
leave, both at addresses that never change; what graphs compute in, kept for all of them; and what a step that is no
graph, or sampling behind it, holds at once.
"""

from dataclasses import dataclass

import torch

from hybridcache.device import room_on
from hybridcache.errors import bad

RESERVE_BYTES = 256 << 20
"""Set aside for libraries (cuBLAS takes 32 MiB a stream), partial results of split attention and the allocator's rounding."""


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. The workspace is an upper bound, not a measurement."""

    weight_bytes: int
    cache_bytes: int
    """The pool."""
    input_bytes: int
    """Static inputs of steps and tables of rows, those for warm-ups of graphs too."""
    logits_bytes: int
    """Logits of ``max_rows`` rows, which graphs write to a static address."""
    graph_bytes: int
    """Scratch memory of the largest graph; the other graphs share it."""
    step_bytes: int
    """Scratch memory of the largest step, whether it prefills or samples."""
    reserve_bytes: int = RESERVE_BYTES

    @property
    def workspace_bytes(self) -> int:
        """Everything beside weights and cache."""
        return self.input_bytes + self.logits_bytes + self.graph_bytes + self.step_bytes + self.reserve_bytes

    @property
    def total_bytes(self) -> int:
        """The most that the engine takes of its device."""
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes

    def require(self, budget_bytes: int, device: torch.device) -> None:
        """Refuse what does not fit beside the weights, which are there already.

        Raises:
            UserError: the device has not enough free memory for cache and workspace; the message says how much would fit.
        """
        room, what = room_on(device)
        if self.cache_bytes + self.workspace_bytes > room:
            fits = max(int(0.98 * room) - self.workspace_bytes, 0)
            raise bad(
                "budget_bytes",
                budget_bytes,
                f"takes {self.cache_bytes} bytes, steps take {self.workspace_bytes} beside it, and {what} is {room}; at "
                f"most {fits} would fit, more with fewer max_tokens_per_step or max_running",
            )
