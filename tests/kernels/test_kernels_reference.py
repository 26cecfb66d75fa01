"""The float64 references (explicit addresses, one token at a time) against the vectorised torch backend, on poisoned pools."""

import random

import pytest
import torch
from kernel_checks import run, state_error

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.block_copy.naive import block_copy
from hybridcache.kernels.gdn_decode.naive import gdn_decode
from hybridcache.kernels.gdn_prefill.naive import gdn_prefill
from hybridcache.kernels.kv_store.naive import kv_store
from hybridcache.kernels.paged_decode.naive import paged_decode
from hybridcache.kernels.paged_prefill.naive import paged_prefill
from hybridcache.kernels.testing import attention_case, cached, rel_error, state_case

SMALL_GDN = {"k_heads": 2, "v_heads": 4, "key_dim": 8, "value_dim": 12}
FLOAT64 = {"dtype": "float64", "conv_dtype": "float64", "state_dtype": "float64"}
ORDERS = [("block_major", 8, 3), ("block_major", 4, 1), ("layer_major", 24, 1)]


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("order", ["block_major", "layer_major"])
def test_gdn_decode(generator, order):
    case = state_case(generator, positions=[0, -1, 1, 2, 3, 500], order=order, **SMALL_GDN, **FLOAT64)
    expected_buffer = case.buffer.clone()
    expected = gdn_decode(*cached(expected_buffer, *case.step(1)))
    out = run(Backend("torch"), "gdn_decode", case.buffer, *case.step(1))
    live = case.state_write_BL[:, 1] >= 0
    assert rel_error(out[live], expected[live]) <= 1e-12
    assert state_error(case, expected_buffer, 1) <= 1e-12


@pytest.mark.parametrize("order", ["block_major", "layer_major"])
def test_gdn_prefill(generator, order):
    """Chunks shorter than the conv, across the 64-token chunk, from position 0 and from a stored state."""
    case = state_case(generator, positions=[0, 0, 2, 100], order=order, **SMALL_GDN, **FLOAT64)
    cu_seqlens = torch.tensor([0, 130, 131, 134, 170], dtype=torch.int32)
    x_TC = torch.randn(170, case.x_BC.shape[1], generator=generator, dtype=torch.float64)
    a_TV, b_TV = (torch.randn(170, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    gates = (a_TV, b_TV, case.a_log_V, case.dt_bias_V)
    start_B = case.position_B.int()
    tables = (case.state_read_BL, case.state_write_BL, cu_seqlens, start_B)
    inputs = (case.layout, 1, x_TC, case.conv_weight_CW, *gates, *tables)
    expected_buffer = case.buffer.clone()
    expected = gdn_prefill(*cached(expected_buffer, *inputs))
    assert rel_error(run(Backend("torch"), "gdn_prefill", case.buffer, *inputs), expected) <= 1e-9
    assert state_error(case, expected_buffer, 1) <= 1e-9


@pytest.mark.parametrize(("order", "kb", "blocks"), ORDERS)
def test_attention(generator, order, kb, blocks):
    """Decode, prefill and the store, K and V of different widths."""
    case = attention_case(
        generator,
        lengths=[1, 65, 130],
        order=order,
        kernel_block_tokens=kb,
        kernel_blocks=blocks,
        k_dim=16,
        v_dim=24,
        dtype="float64",
    )
    q_THD = torch.randn(75, 6, 16, generator=generator, dtype=torch.float64)
    inputs = (case.layout, 1, q_THD[:3], case.kv_table_BN, case.context_len_B, 0.25)
    expected = paged_decode(*cached(case.buffer, *inputs))
    assert rel_error(run(Backend("torch"), "paged_decode", case.buffer, *inputs), expected) <= 1e-12

    cu_seqlens = torch.tensor([0, 1, 66, 75], dtype=torch.int32)
    inputs = (case.layout, 1, q_THD, case.kv_table_BN, cu_seqlens, case.context_len_B, 0.25, 65, 130)
    expected = paged_prefill(*cached(case.buffer, *inputs))
    assert rel_error(run(Backend("torch"), "paged_prefill", case.buffer, *inputs), expected) <= 1e-12

    row_T = torch.tensor([1] * 65 + [2] * 130, dtype=torch.int32)
    position_T = torch.cat([torch.arange(65), torch.arange(130)])
    k_TKD = torch.randn(195, 2, 16, generator=generator, dtype=torch.float64)
    v_TKD = torch.randn(195, 2, 24, generator=generator, dtype=torch.float64)
    expected_buffer = case.buffer.clone()
    kv_store(*cached(expected_buffer, case.layout, 1, k_TKD, v_TKD, case.kv_table_BN, row_T, position_T))
    run(Backend("torch"), "kv_store", case.buffer, case.layout, 1, k_TKD, v_TKD, case.kv_table_BN, row_T, position_T)
    assert torch.equal(case.buffer, expected_buffer)


def test_block_copy(generator):
    buffer = torch.randint(256, (4096,), generator=generator, dtype=torch.uint8)
    expected = buffer.clone()
    moves = [(0, 1000, 700), (1000, 2000, 512), (300, 0, 300), (2000, 300, 64)]
    assert Backend("torch").block_copy(buffer, moves) == block_copy(expected, moves) == 1576
    assert torch.equal(buffer, expected)
