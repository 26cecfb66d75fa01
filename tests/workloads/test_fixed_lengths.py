"""fixed_lengths: all requests alike, ids uniform in their range and a function of the seed."""

import random

import numpy as np
import pytest

from hybridcache.errors import UserError
from hybridcache.workloads import build_workload


def test_requests_are_alike_and_seeded() -> None:
    seed, first = random.randrange(1 << 30), random.randrange(500)
    options = {"num_requests": 7, "prompt_tokens": 300, "output_tokens": 5, "first_id": first, "end_id": first + 40}
    one = build_workload("fixed_lengths", seed=seed, label="chat", **options)
    assert one == build_workload("fixed_lengths", seed=seed, label="chat", **options)
    assert one.name == "chat"
    assert {(r.prompt_tokens, r.output_tokens, r.arrival_s) for r in one.requests} == {(300, 5, 0.0)}
    ids = np.array([r.prompt_ids for r in one.requests])
    assert len({r.prompt_ids for r in one.requests}) == 7, "prompts are independent"
    assert set(ids.ravel().tolist()) == set(range(first, first + 40))  # 2,100 draws miss one of 40 ids once in 10**21
    assert (
        one.requests[0].prompt_ids != build_workload("fixed_lengths", seed=seed + 1, **options).requests[0].prompt_ids
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_requests", 0), ("prompt_tokens", 1.5), ("output_tokens", 0), ("end_id", 1000), ("seed", -1)],
)
def test_refuses(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{option}="):
        build_workload("fixed_lengths", **{option: value})
