"""Host swap on a CPU: which bytes go where, and what is refused."""

import random

import pytest
import torch

from hybridcache.errors import UserError
from hybridcache.kernels.host_swap import naive
from hybridcache.kernels.host_swap.copy_engine import HostPool, HostSwap

BLOCK = 48


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def draw(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randint(256, (count * BLOCK,), generator=generator, dtype=torch.uint8)


def test_blocks_come_back_from_the_host_in_other_places(generator):
    buffer, host = draw(generator, 12), HostPool(9, BLOCK)
    host.buffer.copy_(draw(generator, 9))
    expected, expected_host = buffer.clone(), host.buffer.clone()
    swap = HostSwap(buffer)
    for _ in range(20):
        count = int(torch.randint(0, 9, (1,), generator=generator))
        blocks = torch.randperm(12, generator=generator)[:count].tolist()
        slots = torch.randperm(9, generator=generator)[:count].tolist()
        if torch.rand(1, generator=generator) < 0.3:  # neighbours, which travel together
            blocks, slots = list(range(2, 2 + count)), list(range(count))
        if torch.rand(1, generator=generator) < 0.5:
            transfer = swap.swap_out(blocks, host, slots)
            naive.swap(expected, blocks, expected_host, slots, BLOCK)
        else:
            transfer = swap.swap_in(host, slots, blocks)
            naive.swap(expected_host, slots, expected, blocks, BLOCK)
        assert transfer.done()
        assert transfer.num_bytes == count * BLOCK
        transfer.wait()
        transfer.synchronize()
        assert torch.equal(buffer, expected)
        assert torch.equal(host.buffer, expected_host)


@pytest.mark.parametrize(
    ("blocks", "slots", "field"),
    [
        ([0, 1], [0], "slots"),
        ([0, 0], [1, 2], "blocks"),
        ([4], [0], "blocks"),
        ([0], [3], "slots"),
        ([-1], [0], "blocks"),
    ],
)
def test_pairs_that_do_not_exist_are_refused(generator, blocks, slots, field):
    buffer, host = draw(generator, 4), HostPool(3, BLOCK)
    before = host.buffer.clone()
    with pytest.raises(UserError, match=field):
        HostSwap(buffer).swap_out(blocks, host, slots)
    with pytest.raises(UserError, match=field):
        HostSwap(buffer).swap_in(host, slots, blocks)
    assert torch.equal(host.buffer, before)


@pytest.mark.parametrize(("slots", "size", "field"), [(0, BLOCK, "num_slots"), (1, 0, "block_bytes")])
def test_an_empty_host_pool_is_refused(slots, size, field):
    with pytest.raises(UserError, match=field):
        HostPool(slots, size)
