"""What the host decides before blocks are copied: one batch or several, and which lists are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from hybridcache.kernels.block_copy import naive
from hybridcache.kernels.block_copy.triton import independent, independent_batches, plan, plan_between

MOVES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 6)).filter(lambda m: abs(m[0] - m[1]) >= m[2]),
    min_size=1,
    max_size=8,
)


@given(MOVES)
def test_independent_means_one_batch(moves):
    assert independent(np.asarray(moves, dtype=np.int64)) == (len(independent_batches(moves)) == 1)


@given(MOVES, st.sampled_from([1, 2, 4, 8, 16]), st.randoms())
def test_a_plan_holds_every_move_in_its_units(moves, granule, rng):
    moves = [tuple(value * granule for value in move) for move in moves]
    source = torch.tensor([rng.randrange(256) for _ in range(67 * granule)], dtype=torch.uint8)
    expected, planned = source.clone(), source.clone()
    naive.block_copy(expected, moves)
    for batch in plan(planned, moves):
        in_bytes = (batch.move_M3 * batch.unit_bytes).tolist()
        assert batch.unit_bytes % granule == 0
        assert batch.longest == max(length for _, _, length in in_bytes)
        rng.shuffle(in_bytes)
        naive.block_copy(planned, in_bytes)
    assert torch.equal(planned, expected)


def test_moves_between_buffers_may_not_write_the_same_bytes():
    source, target = torch.zeros(64, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    batch = plan_between(source, target, [(48, 16, 16), (0, 0, 16), (0, 8, 0)])[0]
    assert (batch.move_M3 * batch.unit_bytes).tolist() == [[48, 16, 16], [0, 0, 16]]
    assert plan_between(source, target, []) == []
    with pytest.raises(ValueError, match="same bytes"):
        plan_between(source, target, [(0, 8, 16), (32, 0, 9)])
    with pytest.raises(ValueError, match="leaves the buffer of 64 or 32 bytes"):
        plan_between(source, target, [(0, 32, 16)])
