"""States read through one table and written through another: what every implementation of the GDN operations is held to.

Pools are full of NaN patterns, tables are shuffled. ``operation(cache, *inputs)`` is the implementation under test.
"""

from collections.abc import Callable, Iterable

import torch

from hybridcache.kernels.caches import StateCache
from hybridcache.kernels.gdn_prefill.testing import PrefillCase
from hybridcache.kernels.testing import StateCase, cached, rel_error

LAYER = 1
Operation = Callable[..., torch.Tensor]


def block_of(case: StateCase, entry: int, layer: int = LAYER) -> slice:
    """The bytes of one state, ring included."""
    address = case.layout.address(layer, entry)
    ring = case.layout.conv_kernel * case.layout.conv_channels * StateCache(case.buffer, case.layout, 0).ring.itemsize
    return slice(address, address + case.layout.conv_offset + ring)


def in_place(case: StateCase, buffer: torch.Tensor, step: tuple) -> tuple[torch.Tensor, tuple]:
    """The same step as an update in place: a pool in which every block to be written is a copy of the one to be read, and
    inputs whose read table is the write table. Rows at position 0 have nothing to copy."""
    moved = buffer.clone()
    for source, target in zip(case.state_read_BL[:, LAYER].tolist(), case.state_write_BL[:, LAYER].tolist()):
        if source >= 0:
            moved[block_of(case, target)] = buffer[block_of(case, source)]
    return moved, tuple(case.state_write_BL if value is case.state_read_BL else value for value in step)


def assert_only(before: torch.Tensor, after: torch.Tensor, written: Iterable[slice]) -> None:
    """Bytes outside these blocks are as they were."""
    before, after = before.clone(), after.clone()
    for block in written:
        before[block], after[block] = 0, 0
    assert torch.equal(before, after)


def check_moves(operation: Operation, case: StateCase | PrefillCase) -> torch.Tensor:
    """Apart, and in place on copies: the same outputs, states and rings, to the bit; nothing else is written, so what is only
    read stays as it is. Returns the output."""
    state = case.state if isinstance(case, PrefillCase) else case
    assert state.state_read_BL is not state.state_write_BL
    before = state.buffer.clone()
    moved, step = in_place(state, before, case.step(LAYER))
    expected = operation(*cached(moved, *step))
    out = operation(*cached(state.buffer, *case.step(LAYER)))
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    targets = [block_of(state, entry) for entry in state.state_write_BL[:, LAYER].tolist() if entry >= 0]
    for block in targets:
        assert torch.equal(state.buffer[block], moved[block]), "a block written is not complete"
    assert_only(before, state.buffer, targets)
    return out


def check_equal_tables(operation: Operation, case: StateCase | PrefillCase) -> None:
    """Two equal tables do what one table given twice does."""
    state = case.state if isinstance(case, PrefillCase) else case
    assert state.state_read_BL is state.state_write_BL
    once, step = state.buffer.clone(), case.step(LAYER)
    copied, seen = [], 0
    for value in step:
        copied.append(value.clone() if value is state.state_read_BL and not seen else value)
        seen += value is state.state_read_BL
    expected = operation(*cached(once, *step))
    out = operation(*cached(state.buffer, *copied))
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(state.buffer, once)


def check_shared_source(operation: Operation, case: StateCase | PrefillCase) -> None:
    """All rows read one block that none writes, as forks of a prefix do: each as if it alone did."""
    state = case.state if isinstance(case, PrefillCase) else case
    state.state_read_BL[:, LAYER] = state.state_read_BL[0, LAYER].clone()
    check_moves(operation, case)


def last_inputs(cache: StateCache, entry: int, position: int) -> torch.Tensor:
    """The ring columns that a step at ``position`` reads, the latest first."""
    ring_WC = cache.stored(entry)[1]
    return ring_WC[[past % len(ring_WC) for past in range(position - 1, max(position - len(ring_WC), -1), -1)]]


def check_checkpoints(
    operation: Operation, case: PrefillCase, table_BNL: torch.Tensor, interval: int, tolerance: float = 0.0
) -> None:
    """A checkpoint is a complete state: going on from it repeats what followed it (to the bit, unless the order of sums depends
    on the batch); nothing but it and the rows' targets is written."""
    state, before = case.state, case.state.buffer.clone()
    out = operation(*cached(state.buffer, *case.step(LAYER)), table_BNL, interval)
    after = state.buffer.clone()
    layout, layer, x, weight, a, b, a_log, dt_bias, _, write_BL, cu, start_B = case.step(LAYER)
    written = [block_of(state, entry) for entry in write_BL[:, LAYER].tolist() if entry >= 0]
    resumed = 0
    for row, (start, length) in enumerate(zip(start_B.tolist(), case.lengths)):
        for rank in range(table_BNL.shape[1]):
            position = (start // interval + 1 + rank) * interval
            if position > start + length or int(write_BL[row, LAYER]) < 0:
                continue
            written.append(block_of(state, int(table_BNL[row, rank, LAYER])))
            if position == start + length:
                target = block_of(state, int(write_BL[row, LAYER]))
                assert torch.equal(after[written[-1]], after[target]), (
                    "the checkpoint at the end is not the state there"
                )
                continue
            first, last = int(cu[row]) + position - start, int(cu[row + 1])
            rest = slice(first, last)
            offsets = torch.tensor([0, last - first], dtype=torch.int32, device=x.device)
            begin = torch.tensor([position], dtype=torch.int32, device=x.device)
            tables = (table_BNL[row : row + 1, rank], write_BL[row : row + 1], offsets, begin)
            scratch = after.clone()
            scratch[block_of(state, int(write_BL[row, LAYER]))] = 0xFF
            again = operation(
                *cached(scratch, layout, layer, x[rest], weight, a[rest], b[rest], a_log, dt_bias, *tables)
            )
            assert rel_error(again, out[rest]) <= tolerance
            found, wanted = (StateCache(buffer, layout, layer) for buffer in (scratch, after))
            entry = int(write_BL[row, LAYER])
            assert rel_error(found.stored(entry)[0], wanted.stored(entry)[0]) <= tolerance
            assert torch.equal(last_inputs(found, entry, start + length), last_inputs(wanted, entry, start + length))
            resumed += 1
    assert resumed, "no checkpoint was resumed from"
    assert_only(before, after, written)
