"""The torch backend and the float64 references, with states read through one table and written through another."""

import random

import pytest
import torch
from kernel_checks import run, state_error
from state_tables import LAYER, check_checkpoints, check_equal_tables, check_moves, check_shared_source

from hybridcache.errors import UserError
from hybridcache.kernels.backend import Backend
from hybridcache.kernels.gdn_decode import naive as naive_decode
from hybridcache.kernels.gdn_prefill import naive as naive_prefill
from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
from hybridcache.kernels.testing import cached, rel_error, state_case
from hybridcache.kernels.torch_ops import gated_delta_net as torch_ops

SMALL = {"k_heads": 2, "v_heads": 4, "key_dim": 8, "value_dim": 12}
FLOAT64 = {"dtype": "float64", "conv_dtype": "float64", "state_dtype": "float64"}
MIXED = {"dtype": "bfloat16", "conv_dtype": "bfloat16", "state_dtype": "bfloat16"}
POSITIONS = [0, -1, 1, 2, 3, 500]
PREFILLS = [
    pytest.param([65, 1, 2, 70, 3], [63, 64, -1, 100, 1], id="resumed"),
    pytest.param([5, 130, 1], [0, 0, 2], id="from-0"),
]
DECODES = [torch_ops.gdn_decode, naive_decode.gdn_decode]
OPERATIONS = [torch_ops.gdn_prefill, naive_prefill.gdn_prefill]
NAMES = ["torch", "naive"]


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width", [2, 4, 5])
@pytest.mark.parametrize("dtypes", [FLOAT64, MIXED], ids=["fp64", "bf16"])
@pytest.mark.parametrize("order", ["block_major", "layer_major"])
@pytest.mark.parametrize("operation", DECODES, ids=NAMES)
def test_decode_moves_the_whole_state(generator, operation, order, dtypes, width):
    check_moves(
        operation, state_case(generator, positions=POSITIONS, apart=True, order=order, width=width, **SMALL, **dtypes)
    )


@pytest.mark.parametrize(("lengths", "starts"), PREFILLS)
@pytest.mark.parametrize("dtypes", [FLOAT64, MIXED], ids=["fp64", "bf16"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_prefill_moves_the_whole_state(generator, operation, dtypes, lengths, starts):
    options = {"apart": True, "order": "layer_major", "width": 5, "tail": 2, **SMALL, **dtypes}
    check_moves(operation, prefill_case(generator, lengths=lengths, starts=starts, **options))


def test_decode_apart_is_the_reference(generator):
    case = state_case(generator, positions=POSITIONS, apart=True, **SMALL, **FLOAT64)
    expected_buffer = case.buffer.clone()
    expected = naive_decode.gdn_decode(*cached(expected_buffer, *case.step(LAYER)))
    out = run(Backend("torch"), "gdn_decode", case.buffer, *case.step(LAYER))
    assert rel_error(out, expected) <= 1e-12
    assert state_error(case, expected_buffer, LAYER) <= 1e-12


@pytest.mark.parametrize("apart", [False, True])
def test_prefill_with_checkpoints_is_the_reference(generator, apart):
    options = {"apart": apart, "spare": 20, **SMALL, **FLOAT64}
    case = prefill_case(generator, lengths=[66, 130, 60, 20, 3], starts=[62, 0, 4, 0, -1], tail=3, **options)
    table_BNL = checkpoint_table(case, LAYER, 64, spare=1)
    expected_buffer = case.buffer.clone()
    expected = naive_prefill.gdn_prefill(*cached(expected_buffer, *case.step(LAYER)), table_BNL, 64)
    out = run(Backend("torch"), "gdn_prefill", case.buffer, *case.step(LAYER), table_BNL, 64)
    assert rel_error(out, expected) <= 1e-9
    states = case.state.buffer.view(torch.float64).nan_to_num(nan=-1.0)
    torch.testing.assert_close(states, expected_buffer.view(torch.float64).nan_to_num(nan=-1.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("interval", [64, 128])
@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_a_checkpoint_is_a_complete_state(generator, operation, interval):
    options = {"apart": True, "spare": 20, **SMALL, **FLOAT64}
    case = prefill_case(generator, lengths=[2, 200, 66, 100], starts=[62, 0, 126, 100], **options)
    tolerance = 1e-11 if operation is torch_ops.gdn_prefill else 0.0
    check_checkpoints(operation, case, checkpoint_table(case, LAYER, interval), interval, tolerance)


@pytest.mark.parametrize("interval", [-64, 0, 96])
def test_checkpoint_intervals_are_multiples_of_64(generator, interval):
    case = prefill_case(generator, lengths=[70], starts=[0], spare=4, **SMALL, **FLOAT64)
    table_BNL = checkpoint_table(case, LAYER, 64)
    before = case.buffer.clone()
    with pytest.raises(UserError, match=f"checkpoint_interval={interval}: choose a multiple of 64"):
        run(Backend("torch"), "gdn_prefill", case.buffer, *case.step(LAYER), table_BNL, interval)
    assert torch.equal(case.buffer, before)


def test_equal_tables_are_an_update_in_place(generator):
    for operation in DECODES:
        check_equal_tables(operation, state_case(generator, positions=POSITIONS, **SMALL, **FLOAT64))
    for operation in OPERATIONS:
        case = prefill_case(generator, lengths=[65, 1, 5], starts=[63, 64, 0], **SMALL, **FLOAT64)
        check_equal_tables(operation, case)


def test_several_rows_read_one_block(generator):
    for operation in DECODES:
        check_shared_source(operation, state_case(generator, positions=[70] * 4, apart=True, **SMALL, **FLOAT64))
    for operation in OPERATIONS:
        options = {"apart": True, **SMALL, **FLOAT64}
        check_shared_source(operation, prefill_case(generator, lengths=[3, 64, 1], starts=[64] * 3, **options))


def test_a_state_that_moves_at_every_step_gives_the_same_tokens(generator):
    """Prefills and decodes in turn, each written to another block than it was read from, against one block throughout."""
    case = prefill_case(generator, lengths=[200], starts=[0], spare=4, **SMALL, **FLOAT64)
    layout, layer, x, weight, a, b, a_log, dt_bias, *_ = case.step(LAYER)
    still, backend, done = case.buffer.clone(), Backend("torch"), 0
    blocks = torch.tensor([[[0, 1]], [[0, 4]], [[0, 2]]], dtype=torch.int32)
    while done < 200:
        count = int(torch.randint(1, 40, (1,), generator=generator))
        count = min(count if count % 3 else 1, 200 - done)
        here, read_BL, write_BL = slice(done, done + count), *blocks[:2]
        inputs = (x[here], weight, a[here], b[here], a_log, dt_bias)
        if count == 1:
            operation, rows = "gdn_decode", (torch.tensor([done]),)
        else:
            operation, rows = "gdn_prefill", (torch.tensor([0, count]).int(), torch.tensor([done]).int())
        out = run(backend, operation, case.buffer, layout, layer, *inputs, read_BL, write_BL, *rows)
        expected = run(backend, operation, still, layout, layer, *inputs, blocks[2], blocks[2], *rows)
        assert torch.equal(out, expected)
        case.buffer[layout.address(layer, int(read_BL[0, layer])) :][: layout.stride] = 0xFF
        blocks[[0, 1]] = blocks[[1, 0]]
        done += count
