"""Streams: what a request is, open streams as streams, conversations, shared prompts."""

import random
from typing import Any

import numpy as np
import pytest

from hybridcache.errors import UserError
from hybridcache.workloads import Request, Stream, Workload, build_workload, open_loop
from hybridcache.workloads.base import LazyIds, UniqueIds

SMALL = {"num_conversations": 3, "first_tokens": 7, "rounds": 3, "output_tokens": 2, "new_tokens": 4}


def test_requests_are_equal_by_their_tokens() -> None:
    def request(*ids: int, **more: Any) -> Request:
        return Request(0, 0.0, len(ids), 2, np.array(ids, np.int32), **more)

    assert request(1, 2) == request(1, 2) == Request(0, 0.0, 2, 2, (1, 2))
    assert request(1, 2) == Request(0, 0.0, 2, 2, LazyIds(2, lambda: np.array([1, 2], np.int32)))
    assert hash(request(1, 2)) == hash(request(1, 2))
    assert request(1, 2) != request(1, 3)
    assert request(1, 2) != Request(0, 0.0, 2, 2)
    assert request(1, 2, output_ids=(5, 6)) != request(1, 2, output_ids=(5, 7))
    assert request(1, 2) != "request"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"output_tokens": 0}, "output_tokens=0"),
        ({"prompt_ids": np.zeros(4, np.int32)}, "prompt_ids='4 ids': prompt_tokens says 3"),
        ({"prompt_ids": LazyIds(2, lambda: np.zeros(2))}, "prompt_ids='2 ids'"),
        ({"output_ids": np.zeros(3, np.int32)}, "output_ids='3 ids': output_tokens says 2"),
        ({"service_s": -1.0}, "service_s=-1.0"),
    ],
)
def test_requests_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Request(**{"request_id": 0, "arrival_s": 0.0, "prompt_tokens": 3, "output_tokens": 2, **fields})


def test_lazy_ids_are_made_when_they_are_read() -> None:
    made: list[int] = []
    ids = LazyIds(3, lambda: made.append(1) or np.arange(3, dtype=np.int32))
    assert len(Request(0, 0.0, 3, 1, ids).prompt_ids) == 3
    assert made == []
    assert np.asarray(ids).tolist() == np.asarray(ids, dtype=np.int64).tolist() == [0, 1, 2]
    assert made == [1, 1]


def test_unique_ids_count_down_and_end_with_int32() -> None:
    unique = UniqueIds()
    assert unique.take(3).tolist() == [-1, -2, -3]
    assert unique.take(0).tolist() == []
    assert unique.take(2).tolist() == [-4, -5]
    unique._last = -(1 << 31) + 1
    assert unique.take(1).tolist() == [-(1 << 31)]
    with pytest.raises(UserError, match="int32 cannot number"):
        unique.take(1)


def test_an_open_stream_knows_all_arrivals() -> None:
    workload = Workload("w", "s", (Request(0, 0.0, 1, 1), Request(1, 2.0, 1, 1)))
    assert isinstance(workload, Stream)
    assert workload.fresh() is workload is open_loop(workload)
    assert workload.begin() == workload.requests
    assert list(workload.ended(0, 1.0)) == []
    with pytest.raises(UserError, match=r"workload=conversations: .*beforehand"):
        open_loop(build_workload("conversations", **SMALL))


def prompts(requests: Any) -> dict[int, list[int]]:
    return {r.session: r.prompt_ids.tolist() for r in requests}


def test_conversations_together() -> None:
    """Three conversations; the second round starts when the slowest has ended, and holds what was said."""
    seed = random.randrange(1 << 30)
    one = build_workload("conversations", **SMALL, seed=seed, think_s=0.5)
    first = one.begin()
    assert [(r.request_id, r.session, r.turn, r.arrival_s) for r in first] == [(i, i, 0, 0.0) for i in range(3)]
    assert one.ended(1, 5.0) == []
    assert one.ended(0, 6.0) == []
    second = one.ended(2, 8.0)
    assert [(r.request_id, r.session, r.turn, r.arrival_s) for r in second] == [(3 + i, i, 1, 8.5) for i in range(3)]
    for before, after in zip(first, second):
        assert (before.prompt_tokens, after.prompt_tokens) == (7, 13)
        assert after.prompt_ids[:9].tolist() == [*before.prompt_ids.tolist(), *before.output_ids.tolist()], seed
    # What was really sampled stands in later prompts, however long it is; an aborted conversation says no more.
    assert one.ended(3, 9.0, output_ids=[11, 12, 13]) == []
    assert one.ended(5, 9.5, output_ids=np.array([21, 22])) == []
    third = one.ended(4, 9.75, aborted=True)
    assert [(r.request_id, r.prompt_tokens) for r in third] == [(6, 13 + 3 + 4), (8, 13 + 2 + 4)]
    assert third[0].prompt_ids[:16].tolist() == [*second[0].prompt_ids.tolist(), 11, 12, 13]
    assert third[1].prompt_ids[:15].tolist() == [*second[2].prompt_ids.tolist(), 21, 22]
    assert [one.ended(i, 11.0) for i in (6, 8)] == [[], []], "three rounds"


def test_the_last_of_a_round_may_be_aborted_or_all_of_them() -> None:
    one = build_workload("conversations", **SMALL)
    one.begin()
    assert one.ended(0, 1.0) == one.ended(1, 2.0, aborted=True) == []
    assert [r.request_id for r in one.ended(2, 3.0)] == [3, 5]
    assert one.ended(3, 4.0, aborted=True) == one.ended(5, 4.0, aborted=True) == []


def test_conversations_alone_say_the_same_in_any_order() -> None:
    seed = random.randrange(1 << 30)
    together, alone = (build_workload("conversations", **SMALL, seed=seed, paced=p) for p in ("together", "alone"))
    assert prompts(together.begin()) == prompts(alone.begin())
    (next_,) = alone.ended(1, 3.0)
    assert (next_.request_id, next_.arrival_s, next_.turn) == (4, 3.0, 1)
    (last,) = alone.ended(4, 4.0)
    assert alone.ended(7, 5.0) == []
    assert (last.request_id, last.prompt_tokens) == (7, 19)
    for i in range(2):
        together.ended(i, 1.0)
    assert prompts(together.ended(2, 1.0))[1] == next_.prompt_ids.tolist(), seed
    assert alone.fresh().begin() == together.fresh().begin()
    other = build_workload("conversations", **SMALL, seed=seed + 1)
    assert prompts(other.begin()) != prompts(alone.fresh().begin()), seed


def test_ids_of_conversations_lie_in_their_range_and_differ() -> None:
    one = build_workload("conversations", num_conversations=4, first_tokens=500, first_id=10, end_id=20, rounds=1)
    requests = one.begin()
    assert set(np.concatenate([r.prompt_ids for r in requests]).tolist()) == set(range(10, 20))
    assert all(r.prompt_ids.dtype == np.int32 for r in requests)
    assert len({r.prompt_ids.tobytes() for r in requests}) == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_conversations", 0),
        ("first_tokens", 0),
        ("rounds", 0),
        ("output_tokens", 0),
        ("new_tokens", 0),
        ("paced", "apart"),
        ("think_s", -1),
        ("first_id", -1),
        ("end_id", 1000),
        ("end_id", (1 << 31) + 1),
        ("seed", -1),
    ],
)
def test_conversations_refuse(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{option}="):
        build_workload("conversations", **{option: value})


def test_shared_prompts_share_the_system_prompt_only() -> None:
    seed = random.randrange(1 << 30)
    options = {"num_requests": 20, "shared_tokens": 300, "own_tokens": 50, "output_tokens": 3}
    one = build_workload("shared_prompt", **options, seed=seed)
    assert one == build_workload("shared_prompt", **options, seed=seed)
    assert one != build_workload("shared_prompt", **options, seed=seed + 1), seed
    assert {(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in one.requests} == {(0.0, 350, 3)}
    heads = {r.prompt_ids[:300].tobytes() for r in one.requests}
    tails = {r.prompt_ids[300:].tobytes() for r in one.requests}
    assert (len(heads), len(tails)) == (1, 20)
    assert one.requests[0].prompt_ids.dtype == np.int32
    for option in ("num_requests", "shared_tokens", "own_tokens", "output_tokens", "end_id"):
        with pytest.raises(UserError, match=f"{option}=0"):
            build_workload("shared_prompt", **{option: 0})
