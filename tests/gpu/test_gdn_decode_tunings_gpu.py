"""Every kind of tuning of GDN decode on CUDA, at the shape of Qwen3-Next, against the float64 reference."""

import random
from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
if torch.cuda.is_available():
    from hybridcache.kernels.gdn_decode import hopper, naive
    from hybridcache.kernels.gdn_decode.staging import Staging
    from hybridcache.kernels.gdn_decode.triton import Tuning, gdn_decode
    from hybridcache.kernels.testing import rel_error, state_case, state_error

    TUNINGS = {
        "v8-w1": Tuning(8, 1),
        "v16-w1": Tuning(16, 1),
        "v32-w1": Tuning(32, 1),
        "v32-w2-evict": Tuning(32, 2, evict_first=True),
        "v64-w2": Tuning(64, 2),
        "v128-w4-r200": Tuning(128, 4, max_registers=200),
        "v16-w1-dependent": Tuning(16, 1, dependent_launch=True),
        "v32-w1-packed": Tuning(32, 1, max_registers=144, packed=True),
        "v64-w2-packed": Tuning(64, 2, max_registers=168, packed=True),
    }
    STAGINGS = {
        "v128-w4": Staging(128, 4),
        "v128-w8-c8": Staging(128, 8, chunks=8),
        "v64-w4-c1": Staging(64, 4, chunks=1),
        "v32-w1-dependent": Staging(32, 1, dependent_launch=True),
        "v128-w4-h2": Staging(128, 4, heads=2),
        "v64-w2-h2": Staging(64, 2, heads=2),
        "v128-w4-bulk": Staging(128, 4, bulk=True),
        "v64-w4-bulk": Staging(64, 4, bulk=True),
        "v128-w4-h2-bulk": Staging(128, 4, heads=2, bulk=True),
    }
else:
    TUNINGS, STAGINGS = {}, {}


CUTS = {**TUNINGS, **{f"shared-{name}": staging for name, staging in STAGINGS.items()}}


def run(cut, buffer, step):
    if isinstance(cut, Staging):
        return hopper.gdn_decode(buffer, *step, staging=cut)
    return gdn_decode(buffer, *step, tuning=cut)


@pytest.mark.parametrize("weight_by_column", [False, True], ids=["CW", "WC"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["block_major", "layer_major"])
@pytest.mark.parametrize("name", CUTS)
def test_tunings_agree(name, order, state_dtype, weight_by_column):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    case = state_case(generator, positions=[0, 1, -1, 3, 4711], order=order, state_dtype=state_dtype, device="cuda")
    if weight_by_column:
        case.conv_weight_CW = case.conv_weight_CW.t().contiguous().t()
    for step in range(3):
        expected_buffer = case.buffer.clone()
        expected = naive.gdn_decode(expected_buffer, *case.step(1))
        out = run(CUTS[name], case.buffer, case.step(1))
        assert rel_error(out, expected) <= 1e-2, f"step {step}"
        after = case.buffer.clone()
        assert state_error(case, expected_buffer, 1) <= (1e-5 if state_dtype == "float32" else 1e-2), f"step {step}"
        case.buffer.copy_(after)
        case.position_B += 1


@pytest.mark.parametrize("name", ["v16-w1", "shared-v128-w4", "shared-v128-w4-bulk"])
def test_dependent_launches_wait_for_each_other(name):
    """A chain of steps on the same states, each launch set up before the one ahead of it has ended."""
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(1 << 31))
    case = state_case(generator, positions=[7] * 64, device="cuda")
    results = []
    for dependent in (True, False):
        buffer, cut = case.buffer.clone(), replace(CUTS[name], dependent_launch=dependent)
        steps = [(*case.step(0)[:-1], case.position_B + step) for step in range(20)]
        results.append(([run(cut, buffer, step) for step in steps], buffer))
    (chained, chained_buffer), (alone, alone_buffer) = results
    assert all(torch.equal(first, second) for first, second in zip(chained, alone))
    assert torch.equal(chained_buffer, alone_buffer)


@pytest.mark.parametrize("bulk", [False, True], ids=["cp-async", "bulk"])
def test_shared_memory_is_not_read_before_its_copy_arrives(bulk):
    """Many programs, repeated on the same bytes: a moving result is a race."""
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(1 << 31))
    case = state_case(generator, positions=[9] * 96, layers=1, state_dtype="bfloat16", device="cuda")
    results = []
    for _ in range(10):
        buffer = case.buffer.clone()
        results.append((run(Staging(128, 4, bulk=bulk), buffer, case.step(0)), buffer))
    for out, buffer in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(buffer, results[0][1])
