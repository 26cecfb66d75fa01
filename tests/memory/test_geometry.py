"""The planner: first choices that were worked out by hand, and properties that hold for any hybrid model."""

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.errors import UserError
from hybridcache.memory.geometry import KERNEL_BLOCK_TOKENS, Geometry, geometry, plan
from hybridcache.spec import AttentionKV, CacheSpec, LayerSpec, RecurrentState
from models.configs import shipped_fields


def spec_of(name: str = "qwen3_next_80b_a3b", **kwargs) -> CacheSpec:
    return CacheSpec.from_config(shipped_fields(name), **kwargs)


def cut(found: Geometry) -> tuple[int, int, int]:
    return found.kernel_block_tokens, found.kernel_blocks_per_manager_block, found.states_per_manager_block


@pytest.mark.parametrize(
    ("model", "kv_dtype", "state_dtype", "tp_size", "expected"),
    [
        ("qwen3_next_80b_a3b", "bfloat16", "float32", 1, (8, 11, 1)),
        ("qwen3_next_80b_a3b", "bfloat16", "float32", 2, (8, 11, 1)),
        ("qwen3_next_80b_a3b", "bfloat16", "float32", 4, (8, 11, 2)),
        ("qwen3_next_80b_a3b", "bfloat16", "bfloat16", 1, (8, 17, 3)),
        ("qwen3_next_80b_a3b", "bfloat16", "bfloat16", 2, (8, 17, 3)),
        ("qwen3_next_80b_a3b", "bfloat16", "bfloat16", 4, (8, 3, 1)),
        ("qwen3_next_80b_a3b", "fp8", "float32", 1, (16, 11, 1)),
        ("qwen3_next_80b_a3b", "fp8", "bfloat16", 1, (16, 17, 3)),
        ("qwen3_next_8l", "bfloat16", "float32", 1, (16, 33, 1)),
        ("qwen3_next_8l", "bfloat16", "bfloat16", 1, (16, 17, 1)),
    ],
)
def test_first_choice(model, kv_dtype, state_dtype, tp_size, expected):
    spec = spec_of(model, kv_dtype=kv_dtype, state_dtype=state_dtype, tp_size=tp_size)
    assert cut(plan(spec)[0]) == expected


def test_figures_of_the_reference_geometry():
    found = plan(spec_of())[0]
    assert found.kernel_block_bytes == 196_608
    assert found.manager_block_bytes == 2_162_688 == 2_097_152 + 65_536  # recurrent part and conv ring fill it exactly
    assert found.manager_block_tokens == 88
    assert found.state_blocks_per_request == 36
    assert found.state_padding == pytest.approx(16_384 / 2_146_304)
    assert found.expected_waste_bytes == 36 * 16_384 + 1_081_344
    assert [found.request_blocks(tokens) for tokens in (0, 1, 12, 88, 89, 8192)] == [36, 37, 37, 37, 38, 36 + 94]


@st.composite
def specs(draw) -> CacheSpec:
    """Hybrid models of odd sizes: attention, linear, hybrid and empty layers in any order, at least one of each cache."""
    kv_dtype, kv_size = draw(st.sampled_from([("bfloat16", 2), ("float32", 4), ("float8_e4m3fn", 1), ("float64", 8)]))
    row = st.integers(1, 40).map(lambda units: units * max(16 // kv_size, 1))
    attention = AttentionKV(draw(st.integers(1, 8)), draw(row), draw(st.one_of(st.just(0), row)), kv_dtype)
    shape = draw(st.lists(st.integers(1, 130), min_size=2, max_size=3).map(tuple))
    state = RecurrentState(
        recurrent_shape=shape,
        recurrent_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        conv_channels=draw(st.integers(0, 3000)),
        conv_kernel=draw(st.integers(1, 5)),
        conv_dtype=draw(st.sampled_from(["bfloat16", "float32"])),
    )
    kinds = [(True, False), (False, True), *draw(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))]
    kinds = draw(st.permutations(kinds))
    layers = [LayerSpec(i, attention if kv else None, state if lin else None) for i, (kv, lin) in enumerate(kinds)]
    return CacheSpec(model_type="random", layers=tuple(layers))


@settings(max_examples=60, deadline=None)
@given(spec=specs())
def test_every_candidate_serves_the_kernels_and_the_least_waste_comes_first(spec):
    found = plan(spec)
    layers, stored, t = len(spec.state_layers), spec.stored_state_bytes_per_layer, spec.kv_bytes_per_token
    pairs = [(g.kernel_block_tokens, g.states_per_manager_block) for g in found]
    assert sorted(pairs) == sorted((kb, n) for kb in KERNEL_BLOCK_TOKENS for n in range(1, layers + 1))
    for g in found:
        kb, m, n = cut(g)
        block = m * kb * t
        assert g.manager_block_bytes == block
        assert block >= n * stored >= n * spec.state_bytes_per_layer
        assert block % 128 == 0
        assert block - kb * t < n * stored, "a kernel block less would do"
        # An alternative reading of W: what the state blocks hold beyond the exact states, and half a block of tail.
        assert g.expected_waste_bytes == ceil(layers / n) * block - spec.state_bytes + block / 2
        assert g.expected_waste_bytes >= 0
        assert geometry(spec, *cut(g)) == g
    keys = [(g.expected_waste_bytes, -g.kernel_block_tokens) for g in found]
    assert keys == sorted(keys)


@settings(max_examples=30, deadline=None)
@given(spec=specs(), tokens=st.integers(0, 100_000))
def test_a_request_fits_its_blocks_and_its_waste_is_bounded(spec, tokens):
    for g in plan(spec)[:8]:
        held = g.request_blocks(tokens) * g.manager_block_bytes
        waste = held - spec.request_bytes(tokens)
        states = g.state_blocks_per_request * g.manager_block_bytes - spec.state_bytes
        assert states <= waste < states + g.manager_block_bytes


@settings(max_examples=30, deadline=None)
@given(spec=specs(), data=st.data())
def test_a_block_too_small_for_its_states_is_refused_with_the_size_that_would_do(spec, data):
    g = data.draw(st.sampled_from(plan(spec)))
    kb, _, n = cut(g)
    least = ceil(n * spec.stored_state_bytes_per_layer / g.kernel_block_bytes)
    with pytest.raises(UserError, match=f"^kernel_blocks_per_manager_block={least - 1}: .* at least {least} kernel bl"):
        geometry(spec, kb, least - 1, n)


def test_the_stored_state_decides_what_fits_not_the_exact_one():
    spec = spec_of("qwen3_next_80b_a3b", state_dtype="bfloat16")
    kernel_block_bytes = 8 * spec.kv_bytes_per_token
    assert 12 * spec.state_bytes_per_layer == 67 * kernel_block_bytes
    with pytest.raises(UserError, match=r"12 state\(s\) of 1114112 B need at least 68 kernel blocks"):
        geometry(spec, 8, 67, 12)
    assert geometry(spec, 8, 68, 12).state_padding == pytest.approx(1 / 67)


@pytest.mark.parametrize(
    ("kb", "m", "n", "message"),
    [
        (12, 11, 1, r"^kernel_block_tokens=12: choose one of \(8, 16, 32, 64\)"),
        (0, 11, 1, "^kernel_block_tokens=0: "),
        (128, 11, 1, "^kernel_block_tokens=128: "),
        (8, 10, 1, "^kernel_blocks_per_manager_block=10: .* at least 11 kernel blocks of 196608 B"),
        (8, 0, 1, "^kernel_blocks_per_manager_block=0: "),
        (8, -3, 1, "^kernel_blocks_per_manager_block=-3: "),
        (8, 11.5, 1, "^kernel_blocks_per_manager_block=11.5: give a whole number"),
        (8, 11, 0, "^states_per_manager_block=0: choose 1 to 36"),
        (8, 11, 2, "^kernel_blocks_per_manager_block=11: .* at least 22"),
        (8, 1100, 37, "^states_per_manager_block=37: choose 1 to 36"),
    ],
)
def test_impossible_geometries_are_refused(kb, m, n, message):
    with pytest.raises(UserError, match=message):
        geometry(spec_of(), kb, m, n)


def test_models_without_kv_or_without_states_have_no_geometry():
    spec = spec_of()
    for layers in (spec.layers[:3], spec.layers[3:4]):
        part = replace(spec, layers=layers)
        for call in (lambda part=part: plan(part), lambda part=part: geometry(part, 8, 11, 1)):
            with pytest.raises(UserError, match=r"^spec='qwen3_next': .*attention KV and recurrent states"):
                call()


def test_rows_that_do_not_start_on_16_bytes_are_refused():
    attention = AttentionKV(2, 20, 20, "bfloat16")
    state = RecurrentState((1, 8, 8), "float32", 0, 0, "bfloat16")
    spec = CacheSpec("x", (LayerSpec(0, attention, None), LayerSpec(1, None, state)))
    with pytest.raises(UserError, match=r"^k_dim=20: a row of 40 B"):
        plan(spec)
    with pytest.raises(UserError, match=r"^k_dim=20: a row of 40 B"):
        geometry(spec, 8, 4, 1)
