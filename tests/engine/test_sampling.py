"""Sampling: greedy, temperature, top-k and top-p; randomness that depends on request and position alone."""

import random

import numpy as np
import pytest
import torch

from hybridcache.engine.sampling import (
    NOT_FINITE,
    SamplingParams,
    SamplingRow,
    _pick,
    request_key,
    sample,
    uniform,
    uniforms,
)
from hybridcache.errors import UserError

GREEDY = SamplingParams()


def rows_of(params: SamplingParams, count: int, key: tuple[int, int] = (7, 0)) -> list[SamplingRow]:
    return [SamplingRow(params, key, position) for position in range(count)]


def test_greedy_takes_the_largest_logit():
    logits = torch.randn(9, 50)
    assert sample(logits, rows_of(GREEDY, 9)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0)])
def test_logits_that_are_not_finite_are_told(params):
    logits = torch.randn(3, 50)
    logits[1, 17] = float("nan")
    logits[2, :] = float("-inf")
    tokens = sample(logits, rows_of(params, 3))
    assert 0 <= tokens[0] < 50
    assert tokens[1:] == [NOT_FINITE, NOT_FINITE]


def test_a_masked_token_is_never_drawn():
    logits = torch.zeros(500, 6)
    logits[:, [0, 3, 5]] = float("-inf")
    assert set(sample(logits, rows_of(SamplingParams(temperature=1.0), 500))) == {1, 2, 4}


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    temperature, draws = 1.5, 20_000
    tokens = sample(logits.expand(draws, 4), rows_of(SamplingParams(temperature=temperature), draws))
    found = torch.bincount(torch.tensor(tokens), minlength=4).double() / draws
    expected = torch.softmax(logits / temperature, -1)
    # Five standard deviations of the least certain frequency.
    assert (found - expected).abs().max() < 5 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-307, 5e-324])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_temperature_close_to_0_takes_the_largest_logit(temperature, top_k):
    logits = torch.randn(64, 50) * 8
    logits[:, 7] = logits.amax(-1) + 1.0  # the others are e^-1000 times as likely, or less
    logits[32:] -= 40.0
    params = SamplingParams(temperature=temperature, top_k=top_k)
    assert sample(logits, rows_of(params, 64)) == [7] * 64
    logits[:, 9] = logits[:, 7]  # of two that are equally likely either is drawn
    assert set(sample(logits, rows_of(params, 64))) == {7, 9}


def test_tokens_do_not_depend_on_the_batch():
    seed = random.randrange(2**32)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 300, generator=generator)
    choices = [
        GREEDY,
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.1, min_p=0.05),
    ]
    rows = [SamplingRow(choices[i % 5], (seed, i), i * 3) for i in range(40)]
    together = sample(logits, rows)
    order = random.Random(seed).sample(range(40), 40)
    shuffled = sample(logits[order], [rows[i] for i in order])
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(40)]
    assert together == alone, seed
    assert shuffled == [together[i] for i in order], seed


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)).expand(2000, 4)
    assert set(sample(logits, rows_of(SamplingParams(temperature=1.0, top_k=2), 2000))) == {1, 2}
    assert set(sample(logits, rows_of(SamplingParams(temperature=1.0, top_p=0.65), 2000))) == {1, 2}
    assert set(sample(logits, rows_of(SamplingParams(temperature=1.0, top_p=0.75), 2000))) == {1, 2, 3}
    assert set(sample(logits, rows_of(SamplingParams(temperature=1.0, top_k=1), 50))) == {1}
    # top_p counts within what top_k left: 0.4 / 0.7 of two tokens reaches 0.5.
    assert set(sample(logits, rows_of(SamplingParams(temperature=1.0, top_k=2, top_p=0.5), 2000))) == {1}


def test_min_p_cuts_what_is_far_less_likely_than_the_best():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)).expand(2000, 4)
    for min_p, left in ((0.0, {0, 1, 2, 3}), (0.3, {1, 2, 3}), (0.6, {1, 2}), (1.0, {1})):
        assert set(sample(logits, rows_of(SamplingParams(temperature=1.0, min_p=min_p), 2000))) == left
        # The same cut where the tokens are sorted for another one.
        params = SamplingParams(temperature=1.0, min_p=min_p, top_p=0.95)
        assert set(sample(logits, rows_of(params, 2000))) == left
    # Temperature comes first: at 2 the least likely token has half the weight of the best.
    assert set(sample(logits, rows_of(SamplingParams(temperature=2.0, min_p=0.45), 2000))) == {0, 1, 2, 3}


def test_uniforms_are_those_of_numpy():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    keys = np.array([[rng.randrange(2**63), rng.randrange(2**64)] for _ in range(200)], dtype=np.uint64)
    positions = np.array([rng.choice([0, 1, rng.randrange(2**20), 2**40]) for _ in range(200)])
    expected = [
        np.random.Generator(np.random.Philox(key=key, counter=int(position))).random()
        for key, position in zip(keys, positions)
    ]
    assert uniforms(keys, positions).tolist() == expected, seed


def test_randomness_depends_on_seed_request_and_position():
    assert uniform((3, 0), 5) == uniform((3, 0), 5)
    values = {uniform((seed, request), position) for seed in range(5) for request in range(5) for position in range(40)}
    assert len(values) == 1000
    assert all(0.0 <= value < 1.0 for value in values)
    assert request_key(SamplingParams(seed=9), 1, 2) == request_key(SamplingParams(seed=9), 4, 5)
    assert request_key(GREEDY, 1, 2) != request_key(GREEDY, 1, 3)
    assert request_key(GREEDY, 1, 2) != request_key(GREEDY, 2, 2)
    own = {request_key(SamplingParams(seed=seed), 7, 0) for seed in range(50)}
    assert not own & {request_key(GREEDY, seed, seq_id) for seed in range(50) for seq_id in range(50)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", "12"),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=f"^{field}="):
        SamplingParams(**{field: value})


def test_stop_token_ids_may_be_a_list():
    assert SamplingParams(stop_token_ids=[4, 5]).stop_token_ids == (4, 5)


def test_a_token_of_no_weight_is_not_drawn_at_the_edges_of_the_uniform_number():
    """Shares of the tokens: none, 0 to 1/4, none, 1/4 to 1."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0]], dtype=torch.float64)
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3)):
        assert _pick(weights, torch.tensor([[number]], dtype=torch.float64)).tolist() == [token], number
