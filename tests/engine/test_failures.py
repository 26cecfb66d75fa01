"""Who is to blame for a batch that raised."""

import pytest

from hybridcache.engine.failures import Failures
from hybridcache.engine.request import Request
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.sequence import Status
from hybridcache.engine.step import ScheduledTokens, Step


def make_requests(count: int) -> dict[int, Request]:
    return {i: Request.of(i, [1, 2, 3, 4], SamplingParams(max_tokens=8)) for i in range(count)}


def items_of(requests: dict[int, Request], *ids: int, start: int = 0) -> list[ScheduledTokens]:
    return [ScheduledTokens(requests[i], start, 4) for i in ids]


def test_those_that_failed_together_are_computed_alone_up_to_where_they_failed():
    requests, failures = make_requests(3), Failures(max_retries=1)
    failures.add(items_of(requests, 0, 2), RuntimeError("broken"))
    assert failures.unjudged
    again, ended = failures.judge()
    assert [seq.seq_id for seq in again] == [0, 2]
    assert not ended
    assert not failures.unjudged
    step = Step(items_of(requests, 0, 1, 2))
    assert [[item.seq.seq_id for item in group.items] for group in failures.groups(step)] == [[1], [0], [2]]
    beyond = Step(items_of(requests, 0, 1, 2, start=4))
    assert failures.groups(beyond) == [beyond]


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_one_that_fails_alone_ends_after_its_retries(max_retries):
    requests, failures = make_requests(1), Failures(max_retries)
    for attempt in range(max_retries + 1):
        failures.add(items_of(requests, 0), RuntimeError("broken"))
        again, ended = failures.judge()
        assert bool(again) == (attempt < max_retries)
        assert bool(ended) == (attempt == max_retries)
    assert requests[0].error == "RuntimeError: broken"
    assert failures.steps == max_retries + 1


def test_a_request_ends_once_however_many_of_its_batches_failed():
    requests, failures = make_requests(2), Failures(max_retries=0)
    requests[1].status = Status.FINISHED
    for _ in range(2):
        failures.add(items_of(requests, 0), RuntimeError("broken"))
        failures.add(items_of(requests, 1), RuntimeError("broken"))
    again, ended = failures.judge()
    assert not again
    assert ended == [requests[0]]
    assert requests[1].error is None


def test_one_that_fails_in_company_time_and_again_stays_alone():
    requests, failures = make_requests(2), Failures(max_retries=1)
    for _ in range(2):
        failures.add(items_of(requests, 0, 1), MemoryError("too many rows"))
        failures.judge()
    far = Step(items_of(requests, 0, 1, start=10**6))
    assert len(failures.groups(far)) == 2


def test_moves_that_keep_failing_raise():
    failures, error = Failures(max_retries=1), RuntimeError("no copy")
    failures.not_moved(error)
    failures.relocations = 0
    failures.not_moved(error)
    with pytest.raises(RuntimeError, match="no copy"):
        failures.not_moved(error)


def test_what_is_forgotten_is_judged_by_nobody():
    requests, failures = make_requests(1), Failures(max_retries=0)
    failures.add(items_of(requests, 0), RuntimeError("broken"))
    failures.forget()
    assert not failures.unjudged
    assert failures.judge() == ([], [])
