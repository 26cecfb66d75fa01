"""A warp-specialised kernel that shares nothing between its warps: what a tool reports of it, it reports of the dispatch of
warps that Triton generates, not of any kernel's own memory."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def add_one(ptr, offset, LAYOUT: gl.constexpr):
    at = ptr + offset + gl.arange(0, 128, layout=LAYOUT)
    gl.store(at, gl.load(at) + 1.0)


@gluon.jit
def add_two(ptr, offset, LAYOUT: gl.constexpr):
    at = ptr + offset + gl.arange(0, 128, layout=LAYOUT)
    gl.store(at, gl.load(at) + 2.0)


@gluon.jit(do_not_specialize=["offset"])
def dispatch_kernel(ptr, offset):
    ours: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    theirs: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    gl.warp_specialize(
        [
            (add_one, (ptr, offset, ours)),
            (add_two, (ptr + 128, offset, theirs)),
        ],
        [1],
        [24],
    )


def launch() -> torch.Tensor:
    """Two partitions write a half of the result each.

    Raises:
        ArithmeticError: the result is wrong.
    """
    out = torch.zeros(2 * 256, dtype=torch.float32, device="cuda")
    dispatch_kernel[(1,)](out, 256, num_warps=4)
    expected = torch.tensor([0.0, 0.0, 1.0, 2.0], device="cuda").repeat_interleave(128)
    if not torch.equal(out, expected):
        raise ArithmeticError("the dispatch of warps does not give its partitions' results")
    return out
