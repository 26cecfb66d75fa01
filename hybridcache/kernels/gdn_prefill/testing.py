"""Random batches for the tests and the benchmark of GDN prefill, and references for what it leaves in the pool.

Shapes: T tokens, B rows, L state layers, V value heads, J value dim, N checkpoints of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.testing import StateCase, cached, normal, rel_error, state_case
from hybridcache.kernels.torch_ops.gated_delta_net import gdn_prefill as torch_prefill

Reference = Callable[..., torch.Tensor]


@dataclass
class PrefillCase:
    """Stored states of B requests, and new tokens for each: ``lengths[b]`` from position ``start_B[b]`` on."""

    state: StateCase
    x_TC: torch.Tensor
    a_TV: torch.Tensor
    b_TV: torch.Tensor
    cu_seqlens: torch.Tensor
    start_B: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def buffer(self) -> torch.Tensor:
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
        state=state,
        x_TC=normal(generator, (tokens, state.x_BC.shape[1]), device, dtype),
        a_TV=a_TV,
        b_TV=b_TV,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        start_B=state.position_B.int(),
        lengths=tuple(lengths),
    )


def checkpoint_table(case: PrefillCase, layer: int, interval: int, spare: int = 0) -> torch.Tensor:
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


def checkpointed(
    case: PrefillCase, layer: int, interval: int, table_BNL: torch.Tensor, buffer: torch.Tensor, reference: Reference
) -> list[tuple[int, int, int]]:
    """Write into the pool ``buffer``, which holds what this step starts from, the checkpoints a prefill should leave, by
    running each row alone up to each position. Returns their ``(row, position, entry)``."""
    written, (at, _, x, weight, a, b, a_log, dt_bias, read_BL, write_BL, _, _) = [], case.step(layer)
    offsets = case.cu_seqlens.tolist()
    for row, (start, length) in enumerate(zip(case.start_B.tolist(), case.lengths)):
        position = (start // interval + 1) * interval
        while position <= start + length and int(write_BL[row, layer]) >= 0:
            entry = int(table_BNL[row, position // interval - start // interval - 1, layer])
            here = slice(offsets[row], offsets[row] + position - start)
            cu = torch.tensor([0, position - start], dtype=torch.int32, device=x.device)
            scratch = buffer.clone()
            one = slice(row, row + 1)
            gates = (a[here], b[here], a_log, dt_bias)
            tables = (read_BL[one], write_BL[one], cu, case.start_B[one])
            reference(*cached(scratch, at, layer, x[here], weight, *gates, *tables))
            source = StateCache(scratch, at, layer).stored(int(write_BL[row, layer]))
            for to_part, from_part in zip(StateCache(buffer, at, layer).stored(entry), source):
                to_part.copy_(from_part)
            written.append((row, position, entry))
            position += interval
    return written


def reference64(cache: StateCache, *step: Any) -> torch.Tensor:
    """The torch backend's operation on float64 copies of the inputs: for lengths where one token after the other takes
    too long."""
    return torch_prefill(cache, *(t.double() for t in step[:6]), *step[6:])


def block_errors(
    case: PrefillCase, expected: torch.Tensor, layer: int, entries: Sequence[int] | None = None
) -> tuple[float, bool]:
    """Largest :func:`rel_error` of the layer's states at ``entries`` (the rows' own where None) against those in the pool
    ``expected``, and whether all their conv rings are equal, poison included.

    The error is NaN where a state holds NaN, unless both are equal to the bit. The blocks compared are then zeroed in both
    pools, so that a last comparison of the pools shows whether anything else was written."""
    if entries is None:
        entries = [entry for entry in case.state.state_write_BL[:, layer].tolist() if entry >= 0]
    errors, rings = [0.0], True
    found, wanted = (StateCache(buffer, case.state.layout, layer) for buffer in (case.buffer, expected))
    for entry in entries:
        state_VIJ, ring_WC = found.stored(entry)
        expected_VIJ, expected_WC = wanted.stored(entry)
        if not torch.equal(state_VIJ.view(torch.uint8), expected_VIJ.view(torch.uint8)):
            errors.append(rel_error(state_VIJ, expected_VIJ))
        rings &= torch.equal(ring_WC.view(torch.uint8), expected_WC.view(torch.uint8))
        for part in (state_VIJ, ring_WC, expected_VIJ, expected_WC):
            part.zero_()
    return torch.tensor(errors).max().item(), rings
