"""Capacity: counts and charges of the published geometry (Qwen3-Next-80B, fp32 states, bf16 KV)."""

import random

import pytest

from hybridcache.errors import UserError
from hybridcache.sim.capacity import charge, residents, waste_curve
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from hybridcache.strategies import STRATEGIES, Strategy, build

GIB = 1 << 30


def qwen3_next(layers: int = 48) -> CacheSpec:
    attention = AttentionKV(num_kv_heads=2, k_dim=256, v_dim=256, dtype="bfloat16")
    state = RecurrentState((32, 128, 128), "float32", 8192, 4, "bfloat16")
    kinds = [(None, state) if i % 4 != 3 else (attention, None) for i in range(layers)]
    return CacheSpec("qwen3_next", tuple(LayerSpec(i, kv, st) for i, (kv, st) in enumerate(kinds)))


def factory(name: str, budget: int, layers: int = 48, **options: object):
    spec = qwen3_next(layers)

    def make() -> Strategy:
        return build(name, spec=spec, budget_bytes=budget, **options)

    return make


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("byte_exact", {}, 276),
        ("shared_pool", {}, 268),
        ("shared_pool", {"mode": "carve"}, 274),
        ("padded_page", {}, 206),
        ("large_block", {}, 206),
    ],
)
def test_residents_of_12_tokens_in_20_gib(name: str, options: dict, count: int) -> None:
    found, usage = residents(factory(name, 20 * GIB, **options), 12)
    assert found == usage.residents == count
    assert usage.useful == count * (77_266_944 + 12 * 24_576)


def test_charge_of_one_request() -> None:
    usage = charge(factory("shared_pool", 20 * GIB), 2000)
    assert usage.residents == 1
    assert usage.held == (36 + 23) * 2_162_688
    assert usage.useful == 77_266_944 + 2000 * 24_576


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_more_would_not_fit_and_none_beats_the_bound(name: str) -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    length, budget = rng.randint(1, 3000), rng.randint(GIB, 2 * GIB)
    make = factory(name, budget, layers=8)
    count, usage = residents(make, length)
    bound, _ = residents(factory("byte_exact", budget, layers=8), length)
    assert count <= bound, (seed, length, budget)
    strategy = make()
    assert all(strategy.admit(i, length) for i in range(count)), (seed, length, budget)
    assert not strategy.admit(count, length), (seed, length, budget)
    strategy.check_integrity()
    assert strategy.usage() == usage


def test_a_length_that_never_fits() -> None:
    make = factory("shared_pool", GIB)
    count, usage = residents(make, 10**7)
    assert count == 0
    assert usage.held == 0
    with pytest.raises(UserError, match=r"length=10000000.*shared_pool holds at most"):
        charge(make, 10**7)


def test_a_request_longer_than_the_longest_to_be_served_is_not_admitted() -> None:
    make = factory("shared_pool", GIB, max_request_tokens=100)
    assert residents(make, 100)[0] == residents(factory("shared_pool", GIB), 100)[0] > 0
    count, usage = residents(make, 101)
    assert (count, usage.held) == (0, 0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_waste_curve_is_the_charge_of_every_length(name: str) -> None:
    """Linear between its corners, which are the teeth of a saw: 2 a block."""
    make, up_to = factory(name, GIB, layers=8), random.randint(1100, 1300)
    lengths, waste = waste_curve(make(), up_to)
    assert (lengths[0], lengths[-1]) == (1, up_to)
    for length in random.sample(range(1, up_to + 1), 60):
        after = next(i for i, corner in enumerate(lengths) if corner >= length)
        before = max(after - 1, 0)
        share = (length - lengths[before]) / max(lengths[after] - lengths[before], 1)
        found = waste[before] + share * (waste[after] - waste[before])
        assert found == pytest.approx(charge(make, length).padding), (name, length)


def test_waste_curve_of_88_token_blocks_and_its_early_end() -> None:
    lengths, waste = waste_curve(factory("shared_pool", GIB)(), 200)
    assert lengths == [1, 88, 89, 176, 177, 200]
    assert waste[0] == waste[2] == waste[4] == waste[1] + 87 * 24_576
    strategy = factory("shared_pool", 81 << 20)()
    assert waste_curve(strategy, 10_000)[0][-1] == strategy.request_limit()
