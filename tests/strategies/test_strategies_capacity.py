"""How much each strategy holds: the figures of docs/strategies.md, each from the strategy's own allocator."""

import pytest
from strategies_specs import GIB, MIB, hybrid, qwen3_next

from hybridcache.errors import UserError
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import STRATEGIES, Strategy, build, strategy_class
from hybridcache.strategies.large_block import LargeBlock
from hybridcache.strategies.padded_page import PaddedPage, padded_block_tokens
from hybridcache.strategies.static_split import StaticSplit

PHYSICAL = tuple(name for name in STRATEGIES if strategy_class(name).supports_physical)


def residents(strategy: Strategy, num_tokens: int) -> int:
    """Requests of that length that fit at once."""
    count = 0
    while strategy.admit(count, num_tokens):
        count += 1
    strategy.check_integrity()
    return count


@pytest.mark.parametrize(
    ("name", "options", "state", "expected"),
    [
        ("byte_exact", {}, "float32", 276),
        ("shared_pool", {"mode": "exclusive"}, "float32", 268),
        ("shared_pool", {"mode": "carve"}, "float32", 274),
        ("two_ended", {}, "float32", 272),
        ("lcm_carve", {}, "float32", 267),
        # Jenga gives each new request an empty large page for its KV while there is one, and states need empty ones:
        # 273 large pages are 136 requests of two and one whose KV shares.
        ("lcm_carve", {"order": "jenga"}, "float32", 137),
        ("padded_page", {}, "float32", 206),
        ("large_block", {}, "float32", 206),
        ("static_split", {}, "float32", 131),
        ("static_split", {"q": 5}, "float32", 26),
        ("static_split", {"q": 5, "extra_buffer": True}, "float32", 26),
        ("byte_exact", {}, "bfloat16", 539),
        ("padded_page", {}, "bfloat16", 401),
        ("static_split", {}, "bfloat16", 257),
        ("static_split", {"q": 5}, "bfloat16", 51),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_residents_of_12_tokens_in_20_gib(name: str, options: dict, state: str, expected: int) -> None:
    strategy = build(name, spec=qwen3_next(state=state), budget_bytes=20 * GIB, **options)
    assert residents(strategy, 12) == expected


@pytest.mark.parametrize(
    ("num_tokens", "byte_exact", "shared_pool", "padded_page"),
    [
        (12, 73.97, 76.31, 99.00),
        (545, 86.46, 88.69, 99.00),
        (2000, 120.56, 121.69, 123.75),
        (8192, 265.69, 268.13, 272.25),
    ],
)
def test_charge_of_one_request(num_tokens: int, byte_exact: float, shared_pool: float, padded_page: float) -> None:
    """MiB that one resident holds, fp32 states."""
    expected = {
        "byte_exact": byte_exact,
        "shared_pool": shared_pool,
        "padded_page": padded_page,
        "large_block": padded_page,
    }
    for name, mib in expected.items():
        strategy = build(name, spec=qwen3_next(), budget_bytes=20 * GIB)
        assert strategy.admit(7, num_tokens)
        assert strategy.usage().held / MIB == pytest.approx(mib, abs=0.005), name


@pytest.mark.parametrize(
    ("kv", "state", "tp", "tokens", "page"),
    [
        ("bfloat16", "bfloat16", 1, 544, 1_114_112),
        ("bfloat16", "float32", 1, 1056, 2_162_688),
        ("bfloat16", "bfloat16", 2, 544, 557_056),
        ("bfloat16", "float32", 2, 1056, 1_081_344),
        ("bfloat16", "bfloat16", 4, 272, 278_528),
        ("bfloat16", "float32", 4, 528, 540_672),
        ("float8_e4m3fn", "bfloat16", 1, 1072, 1072 * 1024),
        ("float8_e4m3fn", "float32", 1, 2096, 2096 * 1024),
    ],
)
def test_padded_page_blocks(kv: str, state: str, tp: int, tokens: int, page: int) -> None:
    """The block, the page and the blocks of a request at each tensor parallel size and dtype."""
    spec = qwen3_next(kv, state, tp)
    strategy = PaddedPage(spec, 20 * GIB)
    assert padded_block_tokens(spec) == strategy.block_tokens == tokens
    assert strategy.page_bytes == page
    assert (strategy.group_size, strategy.attention_groups, strategy.state_groups) == (12, 1, 3)
    assert strategy.num_blocks == 20 * GIB // (12 * page)
    for num_tokens in (1, 12, tokens - 1, tokens, tokens + 1, 8192):
        assert strategy.admit(0, num_tokens)
        assert strategy.usage().held == (-(-num_tokens // tokens) + 3) * 12 * page
        strategy.release(0)
    physical = PaddedPage(spec, 20 * GIB, physical=True)
    grown = tokens + 16 if page < spec.stored_state_bytes_per_layer else tokens
    assert physical.block_tokens == grown
    assert physical.page_bytes >= spec.stored_state_bytes_per_layer


def test_padded_page_counts_the_null_block() -> None:
    strategy = PaddedPage(qwen3_next(state="bfloat16"), 20 * GIB)
    assert strategy.num_blocks == 1606
    assert strategy.usage().free == 1605 * strategy.block_bytes
    assert strategy.usage().reserved == 20 * GIB - 1605 * strategy.block_bytes


@pytest.mark.parametrize(
    ("state", "slots", "tokens", "cap"), [("float32", 131, 461_949, 26), ("bfloat16", 257, 460_557, 51)]
)
def test_static_split_pools(state: str, slots: int, tokens: int, cap: int) -> None:
    strategy = StaticSplit(qwen3_next(state=state), 20 * GIB)
    assert (strategy.num_slots, strategy.num_kv_tokens, strategy.running_cap) == (slots, tokens, slots)
    assert StaticSplit(qwen3_next(state=state), 20 * GIB, q=5).running_cap == cap
    assert StaticSplit(qwen3_next(state=state), 20 * GIB, max_running=8).running_cap == 8
    assert StaticSplit(qwen3_next(state=state), 20 * GIB, slots=66).num_slots == 66


def test_static_split_with_the_extra_buffer_holds_three_slots() -> None:
    spec = qwen3_next()
    strategy = StaticSplit(spec, 20 * GIB, q=5, extra_buffer=True)
    assert strategy.admit(0, 1)
    assert strategy.usage().state_bytes == 3 * spec.state_bytes


def test_large_block_sizes() -> None:
    assert LargeBlock(qwen3_next(), 20 * GIB).block_tokens == 1056
    assert LargeBlock(qwen3_next(), 20 * GIB, kernel_block_size=64).block_tokens == 1088
    assert LargeBlock(qwen3_next(state="bfloat16"), 20 * GIB).block_tokens == 544
    assert LargeBlock(qwen3_next(), 20 * GIB, manager_block_size=2112, kernel_block_size=32).page_bytes == 2 * 2_162_688


def test_large_block_watermark_holds_back_admission_only() -> None:
    strategy = LargeBlock(qwen3_next(), 20 * GIB, watermark=0.5)
    assert strategy.num_blocks == 827
    assert residents(strategy, 12) == (827 - 413) // 4
    assert strategy.grow(0, strategy.block_tokens + 1)


def test_admission_asks_for_the_whole_prompt_and_allocates_the_chunk() -> None:
    spec = qwen3_next()
    for name in STRATEGIES:
        strategy = build(name, spec=spec, budget_bytes=GIB)
        limit = strategy.request_limit()
        assert not strategy.admit(0, 64, prompt_tokens=limit + 4096), name
        assert strategy.usage().free + strategy.usage().reserved == GIB, name
        assert strategy.admit(0, 64, prompt_tokens=limit), name
        chunk = strategy.usage().held
        strategy.release(0)
        assert strategy.admit(0, 64), name
        assert strategy.usage().held == chunk, name


def test_request_limit_is_exact() -> None:
    """An empty pool holds a request of the limit, by admission and by growth, and none that is longer."""
    for layers in (8, 48):
        for name in STRATEGIES:
            strategy = build(name, spec=qwen3_next(layers=layers), budget_bytes=GIB)
            limit = strategy.request_limit()
            assert strategy.admit(0, limit), name
            strategy.release(0)
            assert not strategy.admit(0, limit + 1), name
            assert strategy.admit(0, 1), name
            assert strategy.grow(0, limit), name


def test_byte_exact_fills_to_the_last_byte() -> None:
    spec = qwen3_next()
    strategy = build("byte_exact", spec=spec, budget_bytes=spec.request_bytes(100))
    assert strategy.admit(0, 1)
    assert strategy.grow(0, 100)
    assert strategy.usage().free == 0
    assert not strategy.grow(0, 101)


def test_two_ended_charges_a_state_3144_tokens() -> None:
    strategy = build("two_ended", spec=qwen3_next(), budget_bytes=20 * GIB)
    assert strategy.state_charge_tokens == 3144


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("shared_pool", {"mode": "both"}, "mode"),
        ("shared_pool", {"kernel_block_tokens": 16}, "kernel_blocks_per_manager_block"),
        ("large_block", {"kernel_block_size": 8}, "kernel_block_size"),
        ("large_block", {"kernel_block_size": 48}, "kernel_block_size"),
        ("large_block", {"manager_block_size": 1060}, "manager_block_size"),
        ("large_block", {"manager_block_size": 1040}, "manager_block_size"),
        ("large_block", {"watermark": 1.0}, "watermark"),
        ("static_split", {"ratio": 0.0}, "ratio"),
        ("static_split", {"q": 0}, "q"),
        ("static_split", {"extra_buffer": True}, "q"),
        ("static_split", {"slots": 0}, "slots"),
        ("static_split", {"page_size": 0}, "page_size"),
        ("static_split", {"max_running": 0}, "max_running"),
        ("two_ended", {"page_size": 0}, "page_size"),
        ("lcm_carve", {"order": "lru"}, "order"),
        ("lcm_carve", {"page_size": 0}, "page_size"),
        ("lcm_carve", {"physical": True}, "strategy"),
        ("byte_exact", {"physical": True}, "strategy"),
        ("byte_exact", {"page_size": 4}, "page_size"),
    ],
)
def test_bad_options_name_the_field(name: str, options: dict, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}="):
        build(name, spec=qwen3_next(), budget_bytes=20 * GIB, **options)


@pytest.mark.parametrize(("name", "physical"), [(n, False) for n in STRATEGIES] + [(n, True) for n in PHYSICAL])
def test_a_budget_too_small_says_what_would_do(name: str, physical: bool) -> None:
    for spec in (qwen3_next(), qwen3_next("float8_e4m3fn", "bfloat16", 2, 8)):
        with pytest.raises(UserError, match="give at least") as error:
            build(name, spec=spec, budget_bytes=4096, physical=physical)
        enough = int(str(error.value).split("at least ")[1].split()[0])
        assert build(name, spec=spec, budget_bytes=enough, physical=physical).admit(0, 1)


def test_models_of_other_shapes() -> None:
    """More attention than linear layers, MLA, no convolution, no recurrent part: all account; where kernels cannot
    serve the layout, building it physically says so."""
    mla = AttentionKV(1, 576, 0, "bfloat16")
    gqa = AttentionKV(4, 128, 128, "bfloat16")
    mamba = RecurrentState((64, 64, 128), "float32", 4352, 4, "bfloat16")
    conv_only = RecurrentState((), "float32", 2048, 3, "bfloat16")
    no_conv = RecurrentState((32, 64, 64), "float32", 0, 0, "bfloat16")
    for attention, state in ((mla, mamba), (gqa, conv_only), (gqa, no_conv), (mla, no_conv)):
        for layers in ((7, 20), (6, 10), (12, 4), (16, 12)):
            spec = hybrid(*layers, attention, state)
            for name in STRATEGIES:
                strategy = build(name, spec=spec, budget_bytes=GIB)
                assert strategy.admit(0, 100), (name, spec)
                strategy.check_integrity()
    several = hybrid(12, 4, gqa, mamba)
    assert PaddedPage(several, GIB).attention_groups == 3
    with pytest.raises(UserError, match="3 groups"):
        PaddedPage(several, GIB, physical=True)


def test_a_model_that_is_not_hybrid_is_refused() -> None:
    kv = AttentionKV(2, 128, 128, "bfloat16")
    state = RecurrentState((32, 128, 128), "float32", 8192, 4, "bfloat16")
    empty = RecurrentState((), "float32", 0, 4, "bfloat16")
    for layer in (LayerSpec(0, kv, None), LayerSpec(0, None, state), LayerSpec(0, kv, empty)):
        for name in STRATEGIES:
            with pytest.raises(UserError, match=r"^spec="):
                build(name, spec=CacheSpec("llama", (layer,)), budget_bytes=GIB)


def test_a_physical_pool_refuses_rows_off_16_bytes() -> None:
    spec = hybrid(2, 4, AttentionKV(2, 20, 20, "bfloat16"), RecurrentState((2, 8, 8), "float32", 32, 4, "bfloat16"))
    for name in PHYSICAL:
        with pytest.raises(UserError, match=r"^k_dim=20"):
            build(name, spec=spec, budget_bytes=GIB, physical=True)
