"""Metrics against values worked out by hand: every column of a result row, and every event, means what docs/metrics.md says."""

import hashlib
import math
import random
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from hybridcache.engine.sequence import Sequence
from hybridcache.observe.metrics import MAX_MAPS, MAX_SAMPLES, Recorder, tokens_sha256
from hybridcache.observe.time_series import TimeSeries
from hybridcache.workloads import Request

BUDGET = 1000


def usage(useful=0, padding=0, reserved=0, cached=0, residents=0, state=0):
    held = useful + padding
    return SimpleNamespace(
        budget=BUDGET, useful=useful, padding=padding, reserved=reserved, cached=cached,
        free=BUDGET - held - reserved - cached, state_bytes=state, kv_bytes=held - state, residents=residents,
        held=held, utilization=useful / BUDGET,
    )  # fmt: skip


class Scripted:
    """A strategy whose usage is set by hand, in a pool whose first ``states`` bytes are states and whose next are KV."""

    budget_bytes = BUDGET
    bytes_moved, table_entries_appended = 77, 13

    def __init__(self, has_addresses=False):
        self.has_addresses, self.now, self.states, self.kv = has_addresses, usage(), 0, 0

    def usage(self):
        return self.now

    def extents(self):
        from hybridcache.strategies.base import Kind

        pairs = {Kind.STATE: (0, self.states), Kind.KV: (self.states, self.kv)}
        return {kind: np.array([pair], dtype=np.int64) for kind, pair in pairs.items() if pair[1]}


class Events(list):
    def write(self, event):
        self.append(event)

    def of(self, name):
        return [event for event in self if event["event"] == name]


def sequence(seq_id=0, arrival=0.0, first=1.0, finish=2.0, prompt=10, output=2, reason="length", **counts):
    seq = Sequence(seq_id, prompt, output, arrival)
    seq.first_token_s, seq.finish_s, seq.finish_reason, seq.num_output = first, finish, reason, output
    for name, value in counts.items():
        setattr(seq, name, value)
    return seq


def recorded(steps, strategy=None, sink=None, **options):
    """A recorder after steps of ``(time, duration, usage, running, waiting)``."""
    strategy, recorder = strategy or Scripted(), Recorder({"strategy": "s"}, sink, **options)
    for time_s, duration_s, found, running, waiting in steps:
        strategy.now = found
        recorder.step(time_s, duration_s, strategy, running, waiting)
    return recorder, strategy


# -- memory ------------------------------------------------------------------------------------------------------------


def test_means_count_every_step_with_its_duration():
    one = usage(useful=100, padding=10, reserved=50, cached=20, residents=7)
    two = usage(useful=200, padding=30, reserved=90, cached=60, residents=3)
    recorder, strategy = recorded([(0.0, 1.0, one, 3, 9), (1.0, 3.0, two, 7, 1)])
    row = recorder.finish([], strategy)
    assert row["useful_bytes_mean"] == pytest.approx(0.25 * 100 + 0.75 * 200)
    assert row["held_bytes_mean"] == pytest.approx(0.25 * 110 + 0.75 * 230)
    assert row["reserved_bytes_mean"] == pytest.approx(0.25 * 50 + 0.75 * 90)
    assert row["cached_bytes_mean"] == pytest.approx(0.25 * 20 + 0.75 * 60)
    assert row["free_bytes_mean"] == pytest.approx(0.25 * 820 + 0.75 * 620)
    assert row["running_mean"] == pytest.approx(0.25 * 3 + 0.75 * 7)
    assert row["utilization_mean"] == pytest.approx(175 / BUDGET), "useful over the budget, not held"
    parts = ("held", "reserved", "cached", "free")
    assert sum(row[f"{name}_bytes_mean"] for name in parts) == pytest.approx(BUDGET)
    assert (row["residents_peak"], row["steps"], row["budget_bytes"]) == (7, 2, BUDGET)
    assert (row["bytes_moved"], row["table_entries_appended"]) == (77, 13)


def test_the_peak_is_of_every_step_and_a_step_without_duration_has_no_weight():
    recorder, strategy = recorded(
        [(0.0, 2.0, usage(useful=10, residents=1), 1, 0), (2.0, 0.0, usage(useful=900, residents=99), 99, 0)]
    )
    row = recorder.finish([], strategy)
    assert row["residents_peak"] == 99
    assert row["useful_bytes_mean"] == pytest.approx(10)


def test_a_run_without_steps_has_no_means():
    row = Recorder({}).finish([], Scripted())
    assert math.isnan(row["useful_bytes_mean"])
    assert math.isnan(row["utilization_mean"])
    assert math.isnan(row["output_tokens_per_s"])


def test_overlapping_steps_count_with_their_own_time():
    """Step 2 is launched, in other memory, while step 1 runs; the device takes 100 s for step 1 and 1 s for step 2."""
    strategy, recorder = Scripted(), Recorder({})
    strategy.now = usage(useful=100, residents=1)
    one = recorder.observe(0.0, strategy, 1, 0)
    strategy.now = usage(useful=300, residents=2)
    two = recorder.observe(1.0, strategy, 2, 0)
    strategy.now = usage(useful=999)
    recorder.add(one, 100.0)
    recorder.add(two, 1.0)
    row = recorder.finish([], strategy)
    assert row["useful_bytes_mean"] == pytest.approx((100 * 100 + 300 * 1) / 101)
    assert (row["steps"], row["residents_peak"]) == (2, 2)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_throughput_is_output_tokens_from_the_first_arrival_to_the_last_finish():
    done = [
        sequence(0, arrival=101.0, first=103.0, finish=110.0, prompt=500, output=9),
        sequence(1, arrival=100.0, first=102.0, finish=104.0, prompt=64, output=11),
    ]
    recorder, strategy = recorded([(100.0, 3.0, usage(), 1, 0)])
    row = recorder.finish(done, strategy)
    assert row["duration_s"] == pytest.approx(10.0)
    assert row["output_tokens_per_s"] == pytest.approx(20 / 10)
    assert (row["prompt_tokens"], row["output_tokens"]) == (564, 20)


def test_latencies_are_percentiles_over_requests():
    """TTFT 1..11 s and TPOT 0.1..1.1 s, in random order: p50 is the sixth, p90 the tenth, p99 nine tenths to the eleventh."""
    ranks = list(range(1, 12))
    random.shuffle(ranks)
    done = [
        sequence(i, arrival=5.0, first=5.0 + rank, finish=5.0 + rank + 3 * rank / 10, output=4)
        for i, rank in enumerate(ranks)
    ]
    row = Recorder({}).finish(done, Scripted())
    assert [row[f"ttft_p{q}_s"] for q in (50, 90, 99)] == pytest.approx([6.0, 10.0, 10.9])
    assert [row[f"tpot_p{q}_s"] for q in (50, 90, 99)] == pytest.approx([0.6, 1.0, 1.09])


def test_a_request_of_one_token_has_no_time_per_token():
    row = Recorder({}).finish([sequence(output=1)], Scripted())
    assert row["ttft_p50_s"] == 1.0
    assert math.isnan(row["tpot_p50_s"])


def test_preemptions_and_their_recomputed_tokens_are_summed():
    done = [sequence(0, num_preemptions=2, recomputed_tokens=30), sequence(1, num_preemptions=1, recomputed_tokens=4)]
    row = Recorder({}).finish(done, Scripted())
    assert (row["preemptions"], row["recomputed_tokens_preemption"], row["recomputed_tokens_failure"]) == (3, 34, 0)


def test_recomputation_by_preemption_and_by_failure_stand_apart():
    done = [sequence(0, num_preemptions=2, recomputed_tokens=30), sequence(1, num_preemptions=1, recomputed_tokens=4)]
    for seq, tokens in zip(done, (500, 6)):
        seq.recomputed_after_failure = tokens
    events = Events()
    row = Recorder({}, events).finish(done, Scripted())
    assert row["preemptions"] == 3
    assert row["recomputed_tokens_preemption"] == 34
    assert row["recomputed_tokens_failure"] == 506
    assert [event["recomputed_tokens_preemption"] for event in events.of("request")] == [30, 4]
    assert [event["recomputed_tokens_failure"] for event in events.of("request")] == [500, 6]


def test_hit_tokens_are_summed_over_requests():
    """A prompt of 200 tokens that resumes from a checkpoint of its first 128, one that hits nothing, and one of 64."""
    done = [sequence(i) for i in range(3)]
    for seq, tokens in zip(done, (128, 0, 64)):
        seq.hit_tokens = tokens
    events = Events()
    row = Recorder({}, events).finish(done, Scripted())
    assert row["hit_tokens"] == 192
    assert [event["hit_tokens"] for event in events.of("request")] == [128, 0, 64]


def test_refused_and_ended_requests_are_counted_apart():
    events = Events()
    done = [
        sequence(12), sequence(13, reason="stop"), sequence(14, reason="abort"), sequence(15, reason="error"),
    ]  # fmt: skip
    refused = [Request(11, 7.5, 4096, 33)]
    row = Recorder({"strategy": "s"}, events, origin_s=0.5).finish(done, Scripted(), refused)
    assert (row["requests_offered"], row["requests_served"], row["requests_refused"]) == (5, 2, 1)
    expected = {"event": "refused", "strategy": "s", "seq_id": 0, "arrival_s": 7.0, "prompt_tokens": 4096}
    assert events.of("refused") == [{**expected, "output_tokens": 33}]
    assert [event["seq_id"] for event in events.of("request")] == [1, 2, 3, 4], "numbered within the run"


def test_request_events_hold_what_a_request_took():
    events = Events()
    Recorder({"phase": "p"}, events, origin_s=10.0).finish(
        [sequence(7, arrival=12.0, first=15.0, finish=21.0, prompt=40, output=4, num_preemptions=1)], Scripted()
    )
    (event,) = events.of("request")
    assert event["phase"] == "p"
    assert (event["arrival_s"], event["ttft_s"], event["tpot_s"], event["latency_s"]) == (2.0, 3.0, 2.0, 9.0)
    assert (event["prompt_tokens"], event["output_tokens"], event["preemptions"]) == (40, 4, 1)
    assert event["finish_reason"] == "length"


def test_hash_of_tokens():
    one, two = sequence(5), sequence(6)
    one.output_ids, two.output_ids = [9, 2], [70_000]
    expected = hashlib.sha256(struct.pack("<4q", 0, 2, 9, 2) + struct.pack("<3q", 1, 1, 70_000)).hexdigest()
    assert tokens_sha256([two, one]) == expected
    assert Recorder({}).finish([two, one], Scripted())["tokens_sha256"] == expected
    two.output_ids = [70_001]
    assert tokens_sha256([one, two]) != expected
    assert tokens_sha256([sequence()]) is None


# -- time series -------------------------------------------------------------------------------------------------------


def test_few_steps_are_all_there_as_they_were():
    events, found = Events(), usage(useful=300, padding=40, reserved=50, cached=60, state=100)
    recorder, strategy = recorded([(10.0, 2.0, found, 3, 5), (12.0, 1.0, usage(), 0, 0)], sink=events, origin_s=10.0)
    recorder.finish([], strategy)
    first, second = events.of("sample")
    assert first == pytest.approx(
        {
            "event": "sample", "strategy": "s", "step": 0, "time_s": 0.0, "duration_s": 2.0, "useful_bytes": 300,
            "padding_bytes": 40, "reserved_bytes": 50, "cached_bytes": 60, "free_bytes": 550, "state_bytes": 100,
            "kv_bytes": 240, "running": 3, "waiting": 5, "held_bytes_max": 340, "running_max": 3, "waiting_max": 5,
        }
    )  # fmt: skip
    assert (second["step"], second["time_s"], second["duration_s"], second["free_bytes"]) == (1, 2.0, 1.0, BUDGET)


def test_slices_are_of_time_not_of_steps_and_keep_means_and_peaks():
    """3,000 short steps in one second, then 3,000 in an hour: both parts of the time get slices by their length."""
    seed = random.randrange(1 << 30)
    rng = np.random.default_rng(seed)
    durations = np.r_[np.full(3000, 1 / 3000), np.full(3000, 1.2)]
    times = np.cumsum(durations) - durations
    useful, running = rng.integers(0, 900, 6000), rng.integers(0, 50, 6000)
    peak = int(rng.integers(3000, 6000))
    useful[peak], running[peak] = 990, 1000
    events = Events()
    recorder, strategy = recorded(
        [
            (at, lasts, usage(useful=int(now)), int(count), 0)
            for at, lasts, now, count in zip(times, durations, useful, running)
        ],
        sink=events,
    )
    row = recorder.finish([], strategy)
    samples = events.of("sample")
    starts = np.array([event["time_s"] for event in samples])
    weights = np.array([event["duration_s"] for event in samples])
    assert MAX_SAMPLES / 2 <= len(samples) <= MAX_SAMPLES, seed
    assert np.diff(starts).max() <= 2 * np.median(np.diff(starts)), seed
    assert weights.sum() == pytest.approx(durations.sum())
    means = np.array([event["useful_bytes"] for event in samples])
    assert np.average(means, weights=weights) == pytest.approx(np.average(useful, weights=durations)), seed
    assert np.average(means, weights=weights) == pytest.approx(row["useful_bytes_mean"]), seed
    assert max(event["held_bytes_max"] for event in samples) == 990, seed
    (highest,) = [event for event in samples if event["running_max"] == 1000]
    assert highest["time_s"] <= times[peak] <= highest["time_s"] + highest["duration_s"], seed


def test_maps_keep_their_resolution_on_a_long_run():
    """350,000 steps of an hour, the first half of them in its first tenth."""
    series = TimeSeries(MAX_MAPS, lambda first, later: first)
    times = np.r_[np.linspace(0, 360, 175_000, endpoint=False), np.linspace(360, 3600, 175_000)]
    looked_at = 0
    for time_s in times:
        if series.is_new(time_s):
            looked_at += 1
            series.add(SimpleNamespace(time_s=float(time_s)))
    found = np.array([entry.time_s for entry in series.entries])
    assert MAX_MAPS / 2 <= len(found) <= MAX_MAPS
    assert np.median(np.diff(found)) <= 2 * 3600 / MAX_MAPS
    assert np.diff(found).max() <= 4 * 3600 / MAX_MAPS
    assert looked_at < 20 * MAX_MAPS, "a map is dear: few are made and dropped"


def test_steps_at_one_moment_are_one_slice():
    series = TimeSeries(4, lambda first, later: first)
    for _ in range(100):
        series.add(SimpleNamespace(time_s=3.0))
    assert len(series.entries) <= 4


def test_pool_maps_are_of_the_moment():
    events, strategy = Events(), Scripted(has_addresses=True)
    recorder = Recorder({}, events, origin_s=1.0)
    strategy.states, strategy.kv = 500, 250
    recorder.step(1.0, 1.0, strategy, 1, 0)
    strategy.states = 0
    recorder.step(2.0, 1.0, strategy, 1, 0)
    recorder.finish([], strategy)
    first, second = events.of("pool_map")
    assert (first["time_s"], first["step"], second["time_s"], second["step"]) == (0.0, 0, 1.0, 1)
    assert first["state"] == "z" * 80 + "a" * 80
    assert first["kv"] == "a" * 80 + "z" * 40 + "a" * 40
    assert set(second["state"]) == {"a"}
