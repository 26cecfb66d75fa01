"""Where physical strategies put bytes.

Invariants, for every physical strategy, whatever was admitted, grown, released and relocated before:

1. The row of K (``kv=0``) or V (``kv=1``) of head ``h`` of position ``p`` of the request in table row ``b``, in attention layer
   ``l``, lies at byte

       base[l] + table[b, p // Tm] * manager_stride + ((p % Tm) // kb) * kernel_stride
               + kv * kv_stride + (p % kb) * token_stride[kv] + h * head_stride[kv]

   and the state of linear layer ``l`` at byte ``state_base[l] + state_table[b, l] * state_stride``.
2. No two rows or states of residents share a byte, so what a request wrote is what it reads, after any operations.
3. Every row and state lies inside the spans that the strategy says the request holds.
4. A K or V row starts on 16 bytes, a state on 128, and table entries are non-negative int32.

The model writes a stamp of its own for every row and state of every resident, and everything that no resident holds is
filled with NaN patterns in each step.
"""

from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies_contents import Contents
from strategies_specs import GIB, build_in, qwen3_next, small_spec

from hybridcache.errors import UserError
from hybridcache.spec import CacheSpec
from hybridcache.strategies import Strategy, build
from hybridcache.strategies.shared_pool import SharedPool

PHYSICAL = ("shared_pool", "shared_pool_carve", "padded_page", "large_block", "static_split", "two_ended")


def options(name: str, rng: Random, spec: CacheSpec) -> dict:
    """Options of the strategy of that name, drawn at random, with a shuffled placement where there is one."""
    seed = {"placement_seed": rng.randrange(1 << 30)}
    if name.startswith("shared_pool"):
        mode = "carve" if name.endswith("carve") else "exclusive"
        found: dict = {"mode": mode, **seed}
        if rng.random() < 0.6:
            kb, n = rng.choice((8, 16)), rng.randint(1, len(spec.state_layers))
            m = -(-n * spec.stored_state_bytes_per_layer // (kb * spec.kv_bytes_per_token)) + rng.randint(0, 3)
            while (m * kb * spec.kv_bytes_per_token) % 128:
                m += 1
            found |= {"kernel_block_tokens": kb, "kernel_blocks_per_manager_block": m, "states_per_manager_block": n}
        return found
    if name == "large_block":
        return {"kernel_block_size": rng.choice((16, 32)), "watermark": rng.choice((0.0, 0.1)), **seed}
    if name == "static_split":
        return {"ratio": rng.choice((0.3, 0.9, 2.0)), "page_size": rng.choice((None, 1, 8, 16)), **seed}
    if name == "two_ended":
        return {"page_size": rng.choice((1, 4, 16, 64))}
    return seed


def physical(name: str, rng: Random) -> Strategy:
    """A small physical pool of that strategy, with room for a few requests."""
    while True:
        spec = small_spec(rng)
        if name != "padded_page" or len(spec.attention_layers) <= len(spec.state_layers):
            break
    budget = int(spec.request_bytes(200) * rng.uniform(1.5, 8)) + rng.randrange(200)
    return build_in(budget, name.removesuffix("_carve"), spec, physical=True, **options(name, rng, spec))


@pytest.mark.parametrize("name", PHYSICAL)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_and_states_keep_their_contents(name: str, seed: int) -> None:
    rng = Random(seed)
    strategy = physical(name, rng)
    contents = Contents(strategy)
    for _ in range(40):
        seq_id, resident = rng.randrange(8), strategy.residents
        if seq_id not in resident:
            if strategy.admit(seq_id, rng.randint(1, 150)):
                contents.admitted(seq_id)
        elif rng.random() < 0.4:
            strategy.release(seq_id)
            contents.released(seq_id)
        else:
            strategy.grow(seq_id, strategy.num_tokens(seq_id) + rng.randint(1, 60))
        if rng.random() < 0.7:
            contents.step()
    contents.step()
    strategy.check_integrity()


@pytest.mark.parametrize("name", PHYSICAL)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_and_states_lie_inside_their_spans(name: str, seed: int) -> None:
    rng = Random(seed)
    strategy = physical(name, rng)
    for seq_id in range(rng.randint(1, 5)):
        strategy.admit(seq_id, rng.randint(1, 150))
    layout, spec = strategy.layout, strategy.spec
    kv, state = layout.attention, layout.state
    tables = strategy.tables(strategy.residents)
    for row, seq_id in enumerate(strategy.residents):
        held = np.zeros(layout.pool_bytes, dtype=bool)
        for span in strategy.spans():
            if span.seq_id == seq_id:
                held[span.offset : span.offset + span.num_bytes] = True
        last = strategy.num_tokens(seq_id) - 1
        for layer, position, half, head in product(
            range(len(spec.attention_layers)), {0, last, rng.randint(0, last)}, range(2), range(kv.num_kv_heads)
        ):
            start = kv.address(layer, int(tables.kv[row, position // kv.tokens_per_entry]), position, half, head)
            length = kv.head_stride[half]
            assert start % 16 == 0
            assert held[start : start + length].all()
        for layer in range(len(spec.state_layers)):
            start = state.address(layer, int(tables.state_write[row, layer]))
            assert start % 128 == 0
            assert start + spec.stored_state_bytes_per_layer <= layout.pool_bytes
            assert held[start : start + spec.stored_state_bytes_per_layer].all()


@pytest.mark.parametrize("layers", [8, 48])
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", PHYSICAL)
def test_entries_of_real_pools_are_int32(name: str, kv: str, state: str, layers: int) -> None:
    """The highest entry of a 60 GiB pool fits an int32, and the address that it gives lies in the pool."""
    spec = qwen3_next(kv, state, layers=layers)
    mode = {"mode": "carve"} if name.endswith("_carve") else {}
    strategy = build(name.removesuffix("_carve"), spec=spec, budget_bytes=60 * GIB, physical=True, **mode)
    seq_id = 0
    while strategy.admit(seq_id, 40_000):
        seq_id += 1
    tables = strategy.tables(strategy.residents)
    layout = strategy.layout
    assert 0 <= tables.kv.max() < 2**31
    top = layout.attention.address(
        len(spec.attention_layers) - 1, int(tables.kv.max()), layout.attention.tokens_per_entry - 1, 1, 0
    )
    assert top < layout.pool_bytes <= 60 * GIB
    for layer in range(len(spec.state_layers)):
        end = layout.state.address(layer, int(tables.state_write[:, layer].max())) + spec.stored_state_bytes_per_layer
        assert end <= layout.pool_bytes


def test_exclusive_and_carved_tables_address_alike() -> None:
    """The two modes of shared_pool differ in who may hold a kernel block, not in where its bytes lie."""
    spec = qwen3_next()
    whole, carved = (SharedPool(spec, GIB, physical=True, mode=mode) for mode in ("exclusive", "carve"))
    for strategy in (whole, carved):
        assert strategy.admit(0, 1000)
    rows = [strategy.tables([0]).kv[0] for strategy in (whole, carved)]
    for position in (0, 7, 8, 87, 88, 500, 999):
        at = [
            s.layout.attention.address(5, int(row[position // s.layout.attention.tokens_per_entry]), position, 1, 1)
            for s, row in zip((whole, carved), rows, strict=True)
        ]
        assert at[0] == at[1], position


@pytest.mark.parametrize("name", PHYSICAL)
def test_an_accounting_pool_has_no_layout_and_no_tables(name: str) -> None:
    strategy = build(name.removesuffix("_carve"), spec=qwen3_next(), budget_bytes=GIB)
    assert strategy.admit(0, 1)
    for read in (lambda: strategy.layout, lambda: strategy.tables([0])):
        with pytest.raises(UserError, match=r"^physical=False"):
            read()
