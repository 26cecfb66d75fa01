"""Greedy choice against its reference, in Triton's interpreter."""

import random

import pytest
import torch

from hybridcache.kernels.greedy import NOT_FINITE, triton
from hybridcache.kernels.torch_ops import layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (6, 4096), (9, 10_000)])
def test_greedy(rows, vocabulary, dtype):
    """Rows with ties, NaN, infinities and nothing but -inf among random ones."""
    seed = random.SystemRandom().randrange(1 << 31)
    logits = torch.randn(rows, 2 * vocabulary, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, :vocabulary]
    if rows > 5:
        logits[1, vocabulary // 2 :: 3] = 9.0
        logits[2, -1] = float("nan")
        logits[3, 5] = float("inf")
        logits[4] = float("-inf")
        logits[5, :-1] = float("-inf")
    found = []
    for way in (layers, triton):
        ids, feed = torch.full((2, rows), -7)
        way.greedy(logits, ids, feed)
        assert torch.equal(feed, ids.clamp_min(0)), seed
        found.append(ids.tolist())
    assert found[0] == found[1], seed
    if rows > 5:
        assert found[0][2:5] == [NOT_FINITE] * 3
        assert found[0][1] == vocabulary // 2
