"""Random batches for the tests and the benchmark of GDN prefill.

Shapes: T tokens, B rows, L state layers, V value heads, J value dim, N checkpoints of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridcache.kernels.testing import StateCase, normal, state_case


@dataclass
class PrefillCase:
    """Stored states of B requests, and new tokens for each: ``lengths[b]`` from position ``start_B[b]`` on."""

    state: StateCase
    x_TC: Tensor
    a_TV: Tensor
    b_TV: Tensor
    cu_seqlens: Tensor
    start_B: Tensor
    lengths: tuple[int, ...]

    @property
    def buffer(self) -> Tensor:
        return self.state.buffer

    def step(self, layer: int) -> tuple[Any, ...]:
        """Layout, layer and inputs of ``gdn_prefill``."""
        s = self.state
        gates = (self.a_TV, self.b_TV, s.a_log_V, s.dt_bias_V)
        rows = (s.state_read_BL, s.state_write_BL, self.cu_seqlens, self.start_B)
        return (s.layout, layer, self.x_TC, s.conv_weight_CW, *gates, *rows)


def prefill_case(
    generator: torch.Generator, *, lengths: Sequence[int], starts: Sequence[int], tail: int = 0, **options: Any
) -> PrefillCase:
    """Rows of ``lengths`` tokens that resume at ``starts`` in shuffled blocks of a poisoned pool; start -1 makes a padding
    row. ``tail`` tokens behind the last row belong to none. ``options`` are those of
    :func:`hybridcache.kernels.testing.state_case`."""
    state = state_case(generator, positions=starts, **options)
    # The channels of one tap lie together, as the model stores them.
    state.conv_weight_CW = state.conv_weight_CW.t().contiguous().t()
    device, dtype = state.buffer.device, state.x_BC.dtype
    tokens, v_heads = sum(lengths) + tail, state.a_BV.shape[1]
    a_TV, b_TV = normal(generator, (tokens, 2 * v_heads), device, dtype).split(v_heads, dim=1)
    return PrefillCase(
        state=state, x_TC=normal(generator, (tokens, state.x_BC.shape[1]), device, dtype), a_TV=a_TV, b_TV=b_TV,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32), start_B=state.position_B.int(),
        lengths=tuple(lengths),
    )  # fmt: skip


def checkpoint_table(case: PrefillCase, layer: int, interval: int, spare: int = 0) -> Tensor:
    """Free blocks for the state at every multiple of ``interval`` that a row passes, for one layer: ``[B, N, L]`` int32,
    -1 elsewhere. ``spare`` more columns than the longest row needs, filled too: they must not be written."""
    at, table_BL = case.state.layout, torch.cat([case.state.state_read_BL, case.state.state_write_BL])
    end = at.base[layer + 1] if at.base[0] != at.base[-1] and layer + 1 < len(at.base) else case.buffer.numel()
    used = table_BL[:, layer] if at.base[0] != at.base[-1] else table_BL
    free = sorted(set(range((end - at.base[layer]) // at.stride)) - set(used.flatten().tolist()), reverse=True)
    starts = case.start_B.tolist()
    counts = [(start + n) // interval - start // interval for start, n in zip(starts, case.lengths)]
    columns = max(counts) + spare
    table_BNL = torch.full((len(counts), columns, len(at.base)), -1, dtype=torch.int32)
    for row in range(len(counts)):
        for rank in range(columns):
            if not free:
                raise ValueError(f"no free block for checkpoint {rank} of row {row}: make the pool larger")
            table_BNL[row, rank, layer] = free.pop()
    return table_BNL.to(case.buffer.device)
