"""The soak, in short: random requests with aborts and preemptions, every feature on against everything off, in float64."""

import random
from dataclasses import replace

import pytest

from tests.checks import soak


@pytest.fixture(scope="module")
def script():
    return soak


@pytest.mark.parametrize("mode", ["exclusive", "carve"])
def test_tokens_are_equal_and_nothing_is_left_behind(script, mode):
    seed = random.randrange(1 << 31)
    scale = replace(script.SCALES["cpu"], residents=1, prompts=(16, 90, 300))
    record = script.soak(96, "cpu", mode, seed, scale)
    assert record["ok"], record
    assert record["replayed"] > 0
    assert record["off_preemptions"] == 0
    assert record["tokens"] > 400


def test_a_lost_token_a_wrong_one_and_another_end_are_seen(script):
    """The comparison itself, on made-up requests."""

    class Ended:
        def __init__(self, tokens, reason="length"):
            self.output_ids, self.finish_reason = tokens, reason

    expected = [Ended([1, 2, 3]), Ended([4, 5]), Ended([6, 7, 8], "stop"), Ended([9, 10])]
    found = [Ended([1, 2, 3]), Ended([4]), Ended([6, 1, 8], "stop"), Ended([9], "abort")]
    record = script.compare(found, expected)
    assert record["equal"] == 2
    assert [(each["request"], each["at"]) for each in record["parted"]] == [(1, 1), (2, 1)]
    assert record["tokens_agree"] == pytest.approx((3 + 1 + 1 + 1) / (3 + 2 + 3 + 1))
    assert script.compare([Ended([1], "stop")], [Ended([1], "length")])["equal"] == 0
