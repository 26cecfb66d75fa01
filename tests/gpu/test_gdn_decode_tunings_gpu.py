"""Every kind of tuning of GDN decode on CUDA, at the shape of Qwen3-Next, against the float64 reference."""

import random

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
if torch.cuda.is_available():
    from hybridcache.kernels.gdn_decode import naive
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
    }
else:
    TUNINGS = {}


@pytest.mark.parametrize("weight_by_column", [False, True], ids=["CW", "WC"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TUNINGS)
def test_tunings_agree(name, state_dtype, weight_by_column):
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    case = state_case(generator, positions=[0, 1, -1, 3, 4711], state_dtype=state_dtype, device="cuda")
    if weight_by_column:
        case.conv_weight_CW = case.conv_weight_CW.t().contiguous().t()
    for step in range(3):
        expected_buffer = case.buffer.clone()
        expected = naive.gdn_decode(expected_buffer, *case.step(1))
        out = gdn_decode(case.buffer, *case.step(1), tuning=TUNINGS[name])
        assert rel_error(out, expected) <= 1e-2, f"step {step}"
        after = case.buffer.clone()
        assert state_error(case, expected_buffer, 1) <= (1e-5 if state_dtype == "float32" else 1e-2), f"step {step}"
        case.buffer.copy_(after)
        case.position_B += 1


def test_dependent_launches_wait_for_each_other():
    """A chain of steps on the same states, each launch set up before the one ahead of it has ended."""
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(1 << 31))
    case = state_case(generator, positions=[7] * 64, device="cuda")
    chained, alone, position_B = case.buffer.clone(), case.buffer.clone(), case.position_B
    outputs = []
    for buffer, tuning in ((chained, Tuning(16, 1, dependent_launch=True)), (alone, Tuning(16, 1))):
        steps = [(*case.step(0)[:-1], position_B + step) for step in range(20)]
        outputs.append([gdn_decode(buffer, *step, tuning=tuning) for step in steps])
    assert all(torch.equal(first, second) for first, second in zip(*outputs))
    assert torch.equal(chained, alone)
