"""Comparisons: equal work only, differences beyond the noise only, the bound never."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybridcache.observe.report.comparison import BY_COLUMN, compare, contests, judge
from hybridcache.observe.report.load import Run
from hybridcache.observe.report.report import _answers, serving_table
from hybridcache.observe.report.speed_figures import throughput

RATE = BY_COLUMN["output_tokens_per_s"]


def values(**columns):
    return pd.DataFrame(columns, index=range(len(next(iter(columns.values())))))


def words(found, text="{:.0f}", better=+1, **options):
    return judge(found, text.format, better, **options).words()


def make_run(served, offered=10, phase="simulation", **columns):
    """A run of one workload. ``served``: strategy -> request numbers; request n has n + 1 output tokens, arrives at n s, gets
    its first token a second later and ends at 2 s + its own number of seconds after arrival."""
    rows, requests = [], []
    for strategy, numbers in served.items():
        labels = {"phase": phase, "strategy": strategy, "workload": "w", "repetition": 0}
        rows.append(
            {
                **labels, "device": "cost model", "requests_offered": offered, "requests_served": len(numbers),
                "requests_refused": offered - len(numbers), "prompt_tokens": sum(100 * (n + 1) for n in numbers),
                "output_tokens_per_s": 100.0, "utilization_mean": 0.5, "residents_peak": 4, "preemptions": 0,
                "recomputed_tokens_preemption": 0, "recomputed_tokens_failure": 0, "ttft_p50_s": 1.0,
                **{name: column[strategy] for name, column in columns.items()},
            }
        )  # fmt: skip
        for n in numbers:
            requests.append({**labels, "seq_id": n, "arrival_s": float(n), "output_tokens": n + 1, "ttft_s": 1.0})
            requests[-1] |= {"tpot_s": 0.5, "latency_s": 2.0 + n, "finish_reason": "length"}
    return Run(pd.DataFrame(rows), {"request": pd.DataFrame(requests)}, {}, {}, Path("run"))


# -- noise -------------------------------------------------------------------------------------------------------------


def test_titles_name_ties_and_never_the_bound():
    found = values(byte_exact=[9.0], a=[5.0], b=[5.001], c=[1.0])
    assert words(found) == "5 under a and b, 1 under c"
    assert words(found[["a", "b"]], better=-1) == "5 under every strategy"
    assert words(found[["byte_exact"]]) == "9 under byte_exact"


def test_one_repetition_within_one_percent_is_alike():
    found = values(a=[802.0], b=[801.0], c=[795.0], d=[757.0])
    assert words(found) == "802 under a (b and c within 1 %), 757 under d"
    assert words(found[["a", "b", "c"]]) == "802 to 795, no difference beyond 1 %"
    assert words(found, exact=True) == "802 under a, 757 under d", "counts are exact"


def test_repetitions_decide_by_the_interval_of_their_paired_differences():
    """Differences of 2, 1 and 3: mean 2, deviation 1, half interval 4.30 / sqrt(3) = 2.48. Of 20, 19 and 21: the same."""
    found = values(a=[110.0, 200.0, 330.0], b=[108.0, 199.0, 327.0], c=[90.0, 181.0, 309.0])
    verdict = judge(found, "{:.0f}".format, +1)
    assert (verdict.best, verdict.alike, verdict.worst) == (["a"], ["b"], ["c"])
    assert verdict.half_interval == pytest.approx(4.30 / 3**0.5 / 193.333, rel=1e-3)
    assert verdict.decided
    assert verdict.words() == "213 under a (b within the spread of 3 repetitions), 193 under c"
    assert not judge(found[["a", "b"]], "{:.0f}".format, +1).decided


def test_repetitions_without_spread_decide_even_small_differences():
    assert words(values(a=[1000.0, 1000.0], b=[999.0, 999.0])) == "1000 under a, 999 under b"


def test_less_is_better_where_it_is():
    assert words(values(a=[3.0], b=[9.0], c=[9.0]), better=-1) == "3 under a, 9 under b and c"


def test_counts_of_the_capacity_phase_are_exact():
    columns = {"phase": "capacity", "workload": "length=12", "repetition": 0}
    rows = [{**columns, "strategy": name, "residents_peak": count} for name, count in (("a", 1000), ("b", 995))]
    run = Run(pd.DataFrame(rows), {}, {}, {}, Path("run"))
    (found,) = contests(run)
    assert found[0] == "capacity: most residents of 12 tokens"
    assert (found[1].best, found[1].alike, found[1].decided) == (["a"], [], True)


# -- equal work --------------------------------------------------------------------------------------------------------


def test_who_refused_cannot_win():
    everything = list(range(10))
    refused = everything[:7]
    rates = {"a": 441.0, "b": 430.0, "padded_page": 449.0, "byte_exact": 460.0}
    served = {"a": everything, "b": everything, "padded_page": refused, "byte_exact": everything}
    run = make_run(served, output_tokens_per_s=rates)
    comparison = compare(run, "simulation", "w")
    verdict = comparison.judge(RATE)
    assert (verdict.best, set(verdict.means.index)) == (["a"], {"a", "b"})
    assert "padded_page refused 3 of 10 requests and computed 2,700 prompt tokens fewer" in comparison.note
    assert "Ranked are a and b, which served the same" in comparison.note
    title = next(iter(contests(run)))
    assert title[1].best == ["a"]
    assert "padded_page" not in throughput(run, "simulation")[0].get_suptitle()
    assert any("padded_page refused 3" in note for note in _answers(run).notes)
    table = serving_table(run, "simulation", "w")
    refusals = {row[0]: row[table.headings.index("refused")] for row in table.rows}
    assert refusals == {"a": "0", "b": "0", "padded_page": "3", "byte_exact (bound)": "0"}
    assert not any(hasattr(cell, "best") for row in table.rows if row[0] == "padded_page" for cell in row)
    assert any("padded_page refused 3" in note for note in table.notes)


def test_without_two_that_served_the_same_the_common_requests_decide():
    """Common are 0..4: 15 output tokens from 0 s to 4 + 2 + 4 = 10 s under ``a``; ``b`` ends its last one 5 s later."""
    run = make_run({"a": list(range(8)), "b": [0, 1, 2, 3, 4, 9]}, output_tokens_per_s={"a": 10.0, "b": 90.0})
    requests = run.events["request"]
    requests.loc[(requests["strategy"] == "b") & (requests["seq_id"] == 4), "latency_s"] += 5.0
    comparison = compare(run, "simulation", "w")
    assert comparison.common
    verdict = comparison.judge(RATE)
    assert verdict.best == ["a"]
    assert verdict.means.to_dict() == pytest.approx({"a": 15 / 10, "b": 15 / 15})
    assert "over the 5 requests that all served" in comparison.note
    assert comparison.judge(BY_COLUMN["utilization_mean"]) is None, "memory is not a request's"
    card = next(card for card in _answers(run).cards if "output tokens/s" in card.title)
    assert card.value == "1.5"
    assert "over the requests that all served" in card.note


def test_nothing_in_common_ranks_nothing():
    run = make_run({"a": [0, 1], "b": [2, 3]}, output_tokens_per_s={"a": 10.0, "b": 90.0})
    comparison = compare(run, "simulation", "w")
    assert comparison.judge(RATE) is None
    assert "Nothing is ranked" in comparison.note


def test_equal_refusals_are_said_and_compared():
    run = make_run({"a": [0, 1], "b": [0, 1]}, offered=3, output_tokens_per_s={"a": 10.0, "b": 90.0})
    comparison = compare(run, "simulation", "w")
    assert comparison.judge(RATE).best == ["b"]
    assert comparison.note == "Every strategy refused the same 1 of 3 requests."


def test_as_many_requests_are_not_the_same_requests():
    run = make_run({"b": [0, 1, 3], "a": [0, 1, 2], "c": [0, 1, 2]}, offered=4)
    assert set(compare(run, "simulation", "w").rows["strategy"]) == {"a", "c"}


def test_without_events_counts_and_tokens_tell_equal_work():
    run = make_run({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1]}, offered=3)
    bare = dataclasses.replace(run, events={})
    assert set(compare(bare, "simulation", "w").rows["strategy"]) == {"a", "b"}


def test_every_served_request_of_every_repetition_counts():
    seed = random.randrange(1 << 30)
    rng = np.random.default_rng(seed)
    numbers = sorted(rng.choice(50, 20, replace=False).tolist())
    run = make_run({"a": numbers, "b": numbers, "c": numbers[:-1]}, offered=50)
    assert set(compare(run, "simulation", "w").rows["strategy"]) == {"a", "b"}, seed


def test_requests_that_failed_were_not_served():
    run = make_run({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}, offered=3)
    requests = run.events["request"]
    requests.loc[(requests["strategy"] == "b") & (requests["seq_id"] == 2), "finish_reason"] = "error"
    run.results.loc[run.results["strategy"] == "b", "requests_served"] = 2
    assert set(compare(run, "simulation", "w").rows["strategy"]) == {"a", "c"}


def test_common_requests_are_timed_from_the_first_of_them():
    """Common are 3 and 4, which arrive at 3 and 4 s; the last ends 4 + 2 + 4 = 10 s: 9 output tokens in 7 s."""
    run = make_run({"a": [0, 3, 4], "b": [1, 3, 4]}, output_tokens_per_s={"a": 10.0, "b": 90.0})
    verdict = compare(run, "simulation", "w").judge(RATE)
    assert verdict.means.to_dict() == pytest.approx({"a": 9 / 7, "b": 9 / 7})


@pytest.mark.parametrize(
    ("column", "best"),
    [
        ("output_tokens_per_s", "more"), ("residents_peak", "more"), ("utilization_mean", "more"),
        ("preemptions", "less"), ("recomputed_tokens_preemption", "less"), ("ttft_p50_s", "less"), ("ttft_p99_s", "less"),
        ("tpot_p50_s", "less"), ("tpot_p99_s", "less"),
    ],
)  # fmt: skip
def test_what_is_better(column, best):
    run = make_run({"less": [0, 1], "more": [0, 1]}, **{column: {"less": 2.0, "more": 3.0}})
    assert compare(run, "simulation", "w").judge(BY_COLUMN[column]).best == [best]
