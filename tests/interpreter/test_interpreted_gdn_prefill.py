"""GDN prefill in Triton against its float64 reference, on tiny shapes in Triton's interpreter."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton as triton_package
from kernel_checks import block_errors, checkpointed, run
from packaging.version import Version

from hybridcache.errors import UserError
from hybridcache.kernels.backend import Backend
from hybridcache.kernels.gdn_prefill import naive, triton
from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
from hybridcache.kernels.gdn_prefill.tiles import Tiles
from hybridcache.kernels.testing import cached

pytestmark = pytest.mark.skipif(
    Version(triton_package.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="Triton 3.6's interpreter takes no tensor as a loop bound under NumPy >= 2.4",
)
LARGE_CHUNKS = Tiles(chunk=64, key_tile=16, value_tile=16, stages=2, state_warps=4)
"""What a GPU uses for 16-bit types, but for the head's width; float32 has chunks of 16 by default."""
FLOAT32 = {"dtype": "float32", "state_dtype": "float32", "conv_dtype": "float32"}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
SMALL = {"k_heads": 1, "v_heads": 2, "key_dim": 16, "value_dim": 16}


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def check(case, tiles, out_tolerance, state_tolerance):
    """Outputs, states and rings; nothing else in the pool changes."""
    expected_buffer = case.buffer.clone()
    expected = naive.gdn_prefill(*cached(expected_buffer, *case.step(1)))
    out = triton.gdn_prefill(*cached(case.buffer, *case.step(1)), tiles=tiles)
    assert out.dtype == case.x_TC.dtype
    offsets = case.cu_seqlens.tolist()
    # A row of one token from position 0 has the output (q . k) beta v, which may nearly vanish: no relative error there.
    usual = expected.norm() / max(len(case.lengths), 1) ** 0.5
    for row, (first, last) in enumerate(zip(offsets, [*offsets[1:], out.shape[0]])):
        if (expected[first:last] == 0).all():
            assert (out[first:last] == 0).all(), f"tokens of padding row {row}"
        else:
            error = (out[first:last].double() - expected[first:last]).norm()
            assert error <= out_tolerance * max(expected[first:last].norm(), 0.1 * usual), f"row {row}"
    assert (out[offsets[-1] :] == 0).all()
    error, rings = block_errors(case, expected_buffer, 1)
    assert error <= state_tolerance
    assert rings
    assert torch.equal(case.buffer, expected_buffer)


@pytest.mark.parametrize(
    ("tiles", "tolerance"), [pytest.param(None, 1e-5, id="chunk16"), pytest.param(LARGE_CHUNKS, 1e-4, id="chunk64")]
)
@pytest.mark.parametrize(
    ("lengths", "starts"),
    [
        pytest.param([0, 1, 63, 64, 65], [0, 0, 0, 0, 0], id="from-0"),
        pytest.param([65, 1, 0, 3, 70], [63, 64, 9, 1, 100], id="resumed"),
        pytest.param([136], [0], id="T136"),
        pytest.param([2, 40, 1], [62, -1, 5], id="with-padding-row"),
    ],
)
def test_gdn_prefill(generator, lengths, starts, tiles, tolerance):
    """Log decays add up over a chunk, and so do their roundings: long chunks are for 16-bit types."""
    case = prefill_case(generator, lengths=lengths, starts=starts, tail=5, **FLOAT32, **SMALL)
    check(case, tiles, tolerance, tolerance)


@pytest.mark.parametrize(
    ("k_heads", "v_heads", "key_dim", "value_dim", "width"),
    [
        pytest.param(1, 3, 12, 40, 3, id="K1-V3-12x40-W3"),
        pytest.param(2, 2, 24, 8, 2, id="K2-V2-24x8-W2"),
        pytest.param(1, 1, 16, 16, 20, id="K1-V1-16x16-W20"),
    ],
)
def test_gdn_prefill_of_other_shapes(generator, k_heads, v_heads, key_dim, value_dim, width):
    """Head dims that no tile divides; a conv that reaches over several short chunks."""
    case = prefill_case(
        generator,
        lengths=[33, 9, 21],
        starts=[0, 62, 15],
        order="layer_major",
        k_heads=k_heads,
        v_heads=v_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        width=width,
        **FLOAT32,
    )
    check(case, None, 1e-5, 1e-5)


@pytest.mark.parametrize(("steps", "by_channel"), [(4, False), (16, False), (64, True)])
def test_slots_of_a_thread_and_weights_by_channel(generator, steps, by_channel):
    """Whole chunks, and those at a row's ends, whatever a thread walks down; weights in either order."""
    options = {**FLOAT32, **SMALL, "v_heads": 1, "width": 4}
    case = prefill_case(generator, lengths=[130, 66, 2], starts=[0, 126, 1], **options)
    if by_channel:
        case.state.conv_weight_CW = case.state.conv_weight_CW.contiguous()
    check(case, replace(LARGE_CHUNKS, conv_steps=steps), 1e-4, 1e-4)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 4e-3), ("bfloat16", 1e-2)])
def test_gdn_prefill_in_16_bits(generator, dtype, tolerance, state_dtype):
    """The interpreter casts to bfloat16 by cutting bits off, which errs more than a GPU's rounding: outputs only."""
    options = {"dtype": dtype, "state_dtype": state_dtype, "conv_dtype": dtype, **SMALL}
    case = prefill_case(generator, lengths=[70, 64], starts=[100, 0], **options)
    check(case, LARGE_CHUNKS, tolerance, max(tolerance, TOLERANCE[state_dtype]))


def test_gdn_prefill_with_more_rows_than_a_tile(generator):
    """Rows are looked for 32 at a time."""
    lengths = torch.randint(-8, 3, (70,), generator=generator).clamp(min=0).tolist()
    lengths[-1] = 2
    starts = torch.randint(-1, 70, (70,), generator=generator).tolist()
    options = {"k_heads": 1, "v_heads": 1, "key_dim": 8, "value_dim": 8, "width": 2}
    check(prefill_case(generator, lengths=lengths, starts=starts, **FLOAT32, **options), None, 1e-5, 1e-5)


@pytest.mark.parametrize("width", [2, 4])
def test_checkpoints(generator, width):
    """States and rings at multiples of 64 and at the exact end, one right after the start; unused columns stay unused."""
    options = {**FLOAT32, **SMALL, "width": width, "pool_bytes": 1 << 17}
    case = prefill_case(generator, lengths=[66, 130, 60, 20], starts=[62, 0, 4, 0], **options)
    table_BNL = checkpoint_table(case, 1, 64, spare=1)
    expected_buffer = case.buffer.clone()
    kept = checkpointed(case, 1, 64, table_BNL, expected_buffer, naive.gdn_prefill)
    assert [(row, position) for row, position, _ in kept] == [(0, 64), (0, 128), (1, 64), (1, 128), (2, 64)]
    naive.gdn_prefill(*cached(expected_buffer, *case.step(1)))
    triton.gdn_prefill(*cached(case.buffer, *case.step(1)), checkpoint_table_BNL=table_BNL, checkpoint_interval=64)
    for entries in (None, [entry for _, _, entry in kept]):
        error, rings = block_errors(case, expected_buffer, 1, entries)
        # Of a state that strong decay has nearly erased, rounded sums of log decays are what is left.
        assert error <= 5e-5
        assert rings
    assert torch.equal(case.buffer, expected_buffer)


def test_a_checkpoint_resumes_where_it_was_taken(generator):
    """Prefill to 96 with a checkpoint at 64 and go on from it: tokens 64 to 95 come out as the first time."""
    case = prefill_case(generator, lengths=[96], starts=[0], **FLOAT32, **SMALL)
    table_BNL = checkpoint_table(case, 1, 64)
    inputs = case.step(1)
    first = triton.gdn_prefill(*cached(case.buffer, *inputs), checkpoint_table_BNL=table_BNL, checkpoint_interval=64)
    at, layer, x, weight, a, b, a_log, dt_bias, table_BL, *_ = inputs
    tables = (table_BNL[:, 0], table_BL)
    cu, start = torch.tensor([0, 32], dtype=torch.int32), torch.tensor([64], dtype=torch.int32)
    gates = (a[64:], b[64:], a_log, dt_bias)
    again = triton.gdn_prefill(*cached(case.buffer, at, layer, x[64:], weight, *gates, *tables, cu, start))
    assert torch.equal(again, first[64:])


def test_rows_are_apart(generator):
    """NaN in one row's input or state shows in its output and in no other's."""
    case = prefill_case(generator, lengths=[10, 10, 10], starts=[5, 70, 5], **FLOAT32, **SMALL)
    case.x_TC[10:20] = float("nan")
    out = triton.gdn_prefill(*cached(case.buffer, *case.step(1)), tiles=LARGE_CHUNKS)
    assert out[10:20].isnan().all()
    assert out[:10].isfinite().all()
    assert out[20:].isfinite().all()
    case = prefill_case(generator, lengths=[10, 10], starts=[5, 70], **FLOAT32, **SMALL)
    address = case.state.layout.address(1, int(case.state.state_write_BL[1, 1]))
    case.buffer[address : address + 4 * 16 * 16] = 0xFF
    out = triton.gdn_prefill(*cached(case.buffer, *case.step(1)))
    assert out[10:, 0].isnan().all()
    assert out[10:, 1].isfinite().all()
    assert out[:10].isfinite().all()


def test_gdn_prefill_refuses_what_it_cannot_do(generator):
    case = prefill_case(generator, lengths=[4], starts=[0], dtype="float64", **SMALL)
    with pytest.raises(UserError, match="float64"):
        run(Backend("triton"), "gdn_prefill", case.buffer, *case.step(1))
    case = prefill_case(generator, lengths=[4], starts=[0], **FLOAT32, **SMALL)
    table_BNL = torch.full((1, 1, 2), -1, dtype=torch.int32)
    for interval in (0, 100):
        with pytest.raises(UserError, match=f"checkpoint_interval={interval}"):
            triton.gdn_prefill(
                *cached(case.buffer, *case.step(1)), checkpoint_table_BNL=table_BNL, checkpoint_interval=interval
            )
    case.x_TC = case.x_TC.t().contiguous().t()
    with pytest.raises(ValueError, match="contiguous"):
        triton.gdn_prefill(*cached(case.buffer, *case.step(1)))


def test_nothing_to_do(generator):
    case = prefill_case(generator, lengths=[0, 0], starts=[0, 3], **FLOAT32, **SMALL)
    before = case.buffer.clone()
    assert triton.gdn_prefill(*cached(case.buffer, *case.step(1))).shape == (0, 2, 16)
    assert torch.equal(case.buffer, before)
