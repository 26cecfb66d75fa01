"""What kernel tests share: operations called by name, and what a step left in the pool against what it should have left.

Shapes: B rows, L state layers, V value heads, I key dim, J value dim, N checkpoints of a row, C conv channels, W conv width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import isnan
from types import SimpleNamespace
from typing import Any

import torch

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.caches import StateCache, cache_of
from hybridcache.kernels.gdn_prefill.testing import PrefillCase
from hybridcache.kernels.testing import StateCase, cached, rel_error
from hybridcache.kernels.torch_ops.gated_delta_net import gdn_prefill as torch_prefill
from hybridcache.memory.layout import AttentionLayout, StateLayout

Reference = Callable[..., torch.Tensor]


def run(backend: Backend, operation: str, buffer: torch.Tensor, *call: Any, **options: Any) -> Any:
    """An operation of a backend, on the layout and the layer that ``call`` begins with."""
    layout, layer, *inputs = call
    return getattr(backend.bind_layer(buffer, layout, layer), operation)(*inputs, **options)


class Functions:
    """A backend's :meth:`bind_layer` for implementations given by operation (each takes the layer's cache first)."""

    def __init__(self, **implementations: Callable[..., Any]) -> None:
        self.implementations = implementations

    def bind_layer(self, buffer: torch.Tensor, layout: AttentionLayout | StateLayout, layer: int) -> Any:
        cache = cache_of(buffer, layout, layer)
        return SimpleNamespace(**{name: partial(function, cache) for name, function in self.implementations.items()})


def state_error(case: StateCase, expected: torch.Tensor, layer: int) -> float:
    """Largest :func:`rel_error` of the stored states of one layer against those in the pool ``expected``.

    Infinite where any other byte differs: conv rings, blocks that are read only, the other layers, free slots. Both pools'
    states are zeroed.
    """
    worst = 0.0
    found, wanted = (StateCache(buffer, case.layout, layer) for buffer in (case.buffer, expected))
    for entry in case.state_write_BL[:, layer].tolist():
        if entry != -1:
            state_VIJ, expected_VIJ = found.stored(entry)[0], wanted.stored(entry)[0]
            error = rel_error(state_VIJ, expected_VIJ)
            if isnan(error):
                return error
            worst = max(worst, error)
            state_VIJ.zero_()
            expected_VIJ.zero_()
    return worst if torch.equal(case.buffer, expected) else float("inf")


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
