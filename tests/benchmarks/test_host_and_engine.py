"""Scripts about the host and the engine, in short: what they time runs, and what they say of it adds up."""

import pytest

from benchmarks.engine import percentile, serve
from benchmarks.host import decode_step, measure
from hybridcache import LLM


@pytest.mark.parametrize("options", [{}, {"mode": "carve"}], ids=["exclusive", "carve"])
def test_a_decode_step_of_all_requests(options):
    step = decode_step("shared_pool", running=5, steps=8, spread=3, **options)
    assert all(len(step().new_tokens) == 5 for _ in range(4))
    found = measure(step, 6)
    assert 0 < found["median_ms"] <= found["p90_ms"] <= found["max_ms"]


def test_steps_in_which_all_decode_are_told_from_others():
    llm = LLM(
        "tiny", "shared_pool", {"mode": "carve"}, cache_bytes=2 << 20, device="cpu", max_running=4, overlap="false"
    )
    found = serve(llm, 4, 16, 10)
    assert found["output_tokens_per_s"] == pytest.approx(40 / found["seconds"])
    assert found["decode_steps"] + found["other_steps"] == found["steps"]
    assert found["decode_steps"] >= 8
    assert found["decode_host_ms"] <= found["decode_host_max_ms"]
    assert not llm.engine.has_work


def test_percentiles():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 3.0
    assert percentile(list(range(10)), 0.9) == 9
    assert percentile([7.0], 0.9) == 7.0
