"""Triton's GDN kernels with states read through one table and written through another, in Triton's interpreter."""

import random

import numpy as np
import pytest
import torch
import triton as triton_package
from kernel_checks import block_errors, state_error
from packaging.version import Version
from state_tables import LAYER, check_checkpoints, check_equal_tables, check_moves, check_shared_source

from hybridcache.kernels.gdn_decode import naive as naive_decode
from hybridcache.kernels.gdn_decode.triton import gdn_decode
from hybridcache.kernels.gdn_prefill import naive as naive_prefill
from hybridcache.kernels.gdn_prefill.testing import checkpoint_table, prefill_case
from hybridcache.kernels.gdn_prefill.triton import gdn_prefill
from hybridcache.kernels.testing import cached, rel_error, state_case

device_loop_bounds = pytest.mark.skipif(
    Version(triton_package.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="Triton 3.6's interpreter takes no tensor as a loop bound under NumPy >= 2.4",
)
SMALL = {"k_heads": 1, "v_heads": 2, "key_dim": 16, "value_dim": 16}
FLOAT32 = {"dtype": "float32", "state_dtype": "float32", "conv_dtype": "float32"}
BFLOAT16 = {"dtype": "bfloat16", "state_dtype": "bfloat16", "conv_dtype": "bfloat16"}
POSITIONS = [0, -1, 1, 2, 3, 500]


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("width", "order"), [(4, "block_major"), (2, "layer_major"), (5, "layer_major")])
def test_decode_moves_the_whole_state(generator, dtypes, width, order):
    options = {"apart": True, "width": width, "order": order, **SMALL, **dtypes}
    check_moves(gdn_decode, state_case(generator, positions=POSITIONS, **options))


def test_decode_apart_is_the_reference(generator):
    """Value heads in tiles, some of which own no channel of q and k."""
    options = {**SMALL, **FLOAT32, "v_heads": 3, "k_heads": 3, "value_dim": 40}
    case = state_case(generator, positions=POSITIONS, apart=True, **options)
    expected_buffer = case.buffer.clone()
    expected = naive_decode.gdn_decode(*cached(expected_buffer, *case.step(LAYER)))
    assert rel_error(gdn_decode(*cached(case.buffer, *case.step(LAYER))), expected) <= 1e-5
    assert state_error(case, expected_buffer, LAYER) <= 1e-5


@device_loop_bounds
@pytest.mark.parametrize(
    ("lengths", "starts"),
    [pytest.param([17, 1, 2, 3], [15, 16, -1, 1], id="resumed"), pytest.param([5, 1], [0, 2], id="from-0")],
)
def test_prefill_moves_the_whole_state(generator, lengths, starts):
    options = {"apart": True, "order": "layer_major", "tail": 2, **SMALL, **FLOAT32}
    check_moves(gdn_prefill, prefill_case(generator, lengths=lengths, starts=starts, **options))


@device_loop_bounds
def test_prefill_with_checkpoints_is_the_reference(generator):
    options = {"apart": True, "spare": 8, **SMALL, **FLOAT32}
    case = prefill_case(generator, lengths=[3, 65], starts=[62, 0], **options)
    table_BNL = checkpoint_table(case, LAYER, 64)
    expected_buffer = case.buffer.clone()
    expected = naive_prefill.gdn_prefill(*cached(expected_buffer, *case.step(LAYER)), table_BNL, 64)
    out = gdn_prefill(*cached(case.buffer, *case.step(LAYER)), table_BNL, 64)
    assert rel_error(out, expected) <= 1e-5
    for entries in (None, table_BNL[:, 0, LAYER].tolist()):
        error, rings = block_errors(case, expected_buffer, LAYER, entries)
        assert error <= 5e-5
        assert rings
    assert torch.equal(case.buffer, expected_buffer)


@device_loop_bounds
def test_a_checkpoint_is_a_complete_state(generator):
    options = {"apart": True, "spare": 8, **SMALL, **FLOAT32}
    case = prefill_case(generator, lengths=[3, 70], starts=[62, 0], **options)
    check_checkpoints(gdn_prefill, case, checkpoint_table(case, LAYER, 64), 64)


@device_loop_bounds
def test_equal_tables_and_shared_sources(generator):
    check_equal_tables(gdn_decode, state_case(generator, positions=POSITIONS, **SMALL, **FLOAT32))
    check_shared_source(gdn_decode, state_case(generator, positions=[70] * 3, apart=True, **SMALL, **FLOAT32))
    check_equal_tables(gdn_prefill, prefill_case(generator, lengths=[9, 1], starts=[9, 0], **SMALL, **FLOAT32))
    options = {"apart": True, **SMALL, **FLOAT32}
    check_shared_source(gdn_prefill, prefill_case(generator, lengths=[3, 1], starts=[16] * 2, **options))
