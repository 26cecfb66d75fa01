"""Host swap on CUDA: bytes, and the order of transfers with the work around them."""

import random

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
if torch.cuda.is_available():
    from hybridcache.kernels.block_copy import triton as block_copy
    from hybridcache.kernels.host_swap import naive
    from hybridcache.kernels.host_swap.copy_engine import HostPool, HostSwap

BLOCK = 2_162_688
CYCLES = 500_000_000
"""Of a kernel that only waits: about 0.3 s, far longer than a transfer."""


@pytest.fixture
def generator() -> "torch.Generator":
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator("cuda").manual_seed(seed)


def draw(generator, count: int) -> "torch.Tensor":
    return torch.randint(256, (count * BLOCK,), generator=generator, dtype=torch.uint8, device="cuda")


def shuffled(count: int, of: int) -> list[int]:
    return torch.randperm(of)[:count].tolist()


def test_blocks_come_back_from_the_host_in_other_places(generator):
    buffer, host = draw(generator, 24), HostPool(16, BLOCK)
    host.buffer.copy_(draw(generator, 16).cpu())
    expected, expected_host = buffer.clone(), host.buffer.cuda()
    swap = HostSwap(buffer)
    for step in range(12):
        blocks, slots = shuffled(9, 24), shuffled(9, 16)
        if step % 2:
            transfer = swap.swap_out(blocks, host, slots)
            naive.swap(expected, blocks, expected_host, slots, BLOCK)
        else:
            transfer = swap.swap_in(host, slots, blocks)
            naive.swap(expected_host, slots, expected, blocks, BLOCK)
        transfer.wait()
    assert torch.equal(buffer, expected)
    transfer.synchronize()
    assert torch.equal(host.buffer, expected_host.cpu())


def test_a_transfer_sees_the_work_before_it_and_wait_keeps_later_work_behind_it(generator):
    buffer, host = draw(generator, 8), HostPool(4, BLOCK)
    values = draw(generator, 4)
    swap = HostSwap(buffer)
    torch.cuda._sleep(CYCLES)
    buffer[: 4 * BLOCK].copy_(values)  # runs long after the host has asked for the transfer
    out = swap.swap_out([0, 1, 2, 3], host, [0, 1, 2, 3])
    assert not out.done()
    out.wait()
    buffer[: 4 * BLOCK].fill_(7)
    back = swap.swap_in(host, [3, 2, 1, 0], [4, 5, 6, 7])
    back.wait()
    moved = buffer[4 * BLOCK :].clone()
    torch.cuda.synchronize()
    assert out.done()
    assert back.done()
    assert torch.equal(host.buffer, values.cpu())
    assert torch.equal(moved.view(4, BLOCK), values.view(4, BLOCK).flip(0))
    assert (buffer[: 4 * BLOCK] == 7).all()


def test_a_slot_is_not_read_before_it_is_written_nor_overwritten_before_it_is_read(generator):
    """The two directions have a stream each: transfers that share host slots still run in order."""
    buffer, host = draw(generator, 40), HostPool(10, BLOCK)
    before = buffer.clone()
    swap = HostSwap(buffer)
    first, second, third, slots = list(range(10)), list(range(10, 20)), list(range(20, 30)), list(range(10))
    swap.swap_out(first, host, slots)
    swap.swap_in(host, slots, third)
    swap.swap_out(second, host, slots)
    swap.swap_in(host, slots, list(range(30, 40))).wait()
    torch.cuda.synchronize()
    assert torch.equal(buffer[20 * BLOCK : 30 * BLOCK], before[: 10 * BLOCK])
    assert torch.equal(buffer[30 * BLOCK :], before[10 * BLOCK : 20 * BLOCK])


def test_kernels_run_beside_a_transfer(generator):
    """A transfer does not wait for work that the calling stream gets after it."""
    buffer, host = draw(generator, 4), HostPool(4, BLOCK)
    swap = HostSwap(buffer)
    transfer = swap.swap_out([0, 1], host, [0, 1])
    torch.cuda._sleep(3 * CYCLES)
    end = torch.cuda.Event()
    end.record()
    transfer.synchronize()
    assert not end.query()
    torch.cuda.synchronize()


def test_the_copy_kernel_reaches_pinned_memory(generator):
    buffer, host = draw(generator, 6), HostPool(6, BLOCK)
    moves = [(src * BLOCK, dst * BLOCK, BLOCK) for src, dst in zip(range(6), shuffled(6, 6))]
    block_copy.run(buffer, host.buffer, block_copy.plan_between(buffer, host.buffer, moves))
    torch.cuda.synchronize()
    for src, dst, _ in moves:
        assert torch.equal(host.buffer[dst : dst + BLOCK], buffer[src : src + BLOCK].cpu())
