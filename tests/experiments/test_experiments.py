"""Every experiment runs in its fast form from the command line and leaves its files."""

import json

import pandas as pd
import pytest
from command_line import ROOT, run
from omegaconf import OmegaConf

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
REQUIRED = [
    "experiment", "phase", "strategy", "workload", "repetition", "device", "model", "backend", "budget_bytes",
    "residents_peak", "useful_bytes_mean", "held_bytes_mean", "utilization_mean", "preemptions",
    "recomputed_tokens_preemption", "recomputed_tokens_failure", "requests_offered", "requests_served", "requests_refused",
    "hit_tokens", "prompt_tokens", "output_tokens", "output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s",
    "tokens_sha256",
]  # fmt: skip
EVERY_PHASE = [
    "seed", "tp_size", "num_devices", "kv_dtype", "state_dtype", "strategy_options", "requests_offered", "requests_served",
    "requests_refused",
]  # fmt: skip
EVERY_EXPERIMENT = [
    "experiment", "phase", "strategy", "workload", "repetition", "device", "model", "tp_size", "num_devices", "kv_dtype",
    "state_dtype",
]  # fmt: skip
SERVED = ["shared_pool", "shared_pool_carve", "large_block", "padded_page", "static_split", "two_ended"]
READ_CLOSELY = {"serve_throughput", "shared_pool", "prefix_reuse", "checkpoint_policies"}
"""Those whose files have tests of their own."""
PHYSICAL = [*SERVED[:5], "static_split_tuned", *SERVED[5:]]


def test_every_experiment_is_listed():
    assert {"geometry", *READ_CLOSELY} <= set(EXPERIMENTS)


def run_fast(name, tmp_path, *options):
    done = run(f"+experiment={name}", "fast=true", "tracking=disabled", f"hydra.run.dir={tmp_path}", *options)
    assert done.returncode == 0, done.stderr
    for file in ("config.yaml", "environment.json", "results.parquet"):
        assert (tmp_path / file).exists(), file
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert set(EVERY_EXPERIMENT) <= set(results.columns)
    assert (results["tp_size"] == results["num_devices"]).all()
    if name == "kernels":
        kinds = {
            op: rows[["kv_dtype", "state_dtype"]].fillna("").drop_duplicates().values.tolist()
            for op, rows in results.groupby("op")
        }
        assert kinds["gdn_decode"] == [["", "float32"], ["", "bfloat16"]]
        assert kinds["paged_decode"] == [["bfloat16", ""]]
        assert kinds["block_copy"] == [["", ""]]
    if name == "kernel_block_size":
        assert set(results.loc[results["phase"] == "resources", "kv_dtype"]) == {"bfloat16"}


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - READ_CLOSELY))
def test_runs_in_fast_form(name, tmp_path):
    run_fast(name, tmp_path)


def test_serve_throughput_serves_every_workload_under_every_strategy(tmp_path):
    run_fast("serve_throughput", tmp_path, "serve_trace=true")
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert set(REQUIRED) <= set(results.columns)
    assert set(EVERY_PHASE) <= set(results.columns[results.notna().all()])
    assert set(results["strategy"]) == set(SERVED)
    assert (results.groupby("workload")["strategy"].nunique() == len(SERVED)).all()
    assert results.groupby("workload")["output_tokens"].first().to_dict() == {"bs1": 4, "chat": 16}
    assert (results["output_tokens_per_s"] > 0).all()
    assert "step_profile_inference" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "decode-trace.json").exists()
    events = pd.read_json(tmp_path / "events.jsonl", lines=True)
    longest = results.groupby(["strategy", "workload"])["duration_s"].max()
    for key, rows in events[events["event"] == "sample"].groupby(["strategy", "workload"]):
        assert rows["time_s"].between(0, longest[key]).all(), "time counts from the workload's beginning"
    assert events.loc[events["event"] == "request", "arrival_s"].between(0, longest.max()).all()


def test_shared_pool_leaves_everything(tmp_path):
    run_fast("shared_pool", tmp_path)
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert set(REQUIRED) <= set(results.columns)
    assert set(results["phase"]) == {"capacity", "simulation", "inference"}
    assert results[EVERY_PHASE].notna().all().all(), "in every phase"
    assert "auto" not in (tmp_path / "config.yaml").read_text()
    recorded = OmegaConf.load(tmp_path / "config.yaml")
    assert (recorded.tp_size, recorded.kv_dtype, recorded.inference.kv_dtype) == (4, "bfloat16", "float64")
    simulation = results[results["phase"] == "simulation"]
    assert set(simulation["num_devices"]) == {4}
    assert set(simulation["device"]) == {"cost model: 4 x H100"}
    tuned = simulation[simulation["strategy"] == "static_split_tuned"].iloc[0]
    assert json.loads(tuned["strategy_options"])["ratio"] > 0
    inference = results[results["phase"] == "inference"]
    assert set(inference["tp_size"]) == {1}
    assert list(inference["strategy"]) == PHYSICAL
    assert inference["tokens_sha256"].nunique() == 1, "float64 tokens agree"
    assert (inference["output_tokens"] > 0).all()
    for launches in inference["launches"]:
        assert {name.split("[")[1] for name in json.loads(launches)} == {"torch]"}
    assert (tmp_path / "report.html").stat().st_size > 50_000
    pictures = sorted((tmp_path / "figures").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert picture.with_suffix(".csv").exists(), picture.name
    events = {json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()}
    assert {"capacity", "charge", "sample", "pool_map", "request"} <= events


def test_requests_above_the_longest_are_refused_in_every_phase(tmp_path):
    options = ["strategies=[shared_pool,two_ended]", "fast=true", "tracking=disabled"]
    results = {}
    for limit in ("64", "null"):
        path = tmp_path / limit
        done = run("+experiment=shared_pool", *options, f"engine.max_model_len={limit}", f"hydra.run.dir={path}")
        assert done.returncode == 0, done.stderr
        results[limit] = (
            pd.read_parquet(path / "results.parquet").set_index(["phase", "strategy", "workload"]).sort_index()
        )
        asked = pd.read_json(path / "events.jsonl", lines=True).query("event == 'request'")
        if limit == "64":
            assert (asked["prompt_tokens"] + asked["output_tokens"] - 1).max() <= 64
    few, all_of_them = results["64"], results["null"]
    assert (all_of_them["requests_refused"] == 0).all()
    assert set(few.loc[("capacity", slice(None), "length=2000"), "requests_refused"]) == {1}
    assert set(few.loc[("capacity", slice(None), "length=12"), "requests_refused"]) == {0}
    for phase in ("simulation", "inference"):
        served, refused = (set(few.loc[phase, f"requests_{what}"]) for what in ("served", "refused"))
        assert len(served) == len(refused) == 1, "every strategy refuses the same"
        offered = all_of_them.loc[phase, "requests_served"].iat[0]
        assert served.pop() + refused.pop() == offered > few.loc[phase, "requests_served"].iat[0]
    shorter = few.loc["capacity", "reserved_bytes_mean"] - all_of_them.loc["capacity", "reserved_bytes_mean"]
    assert (shorter <= 0).all()
    assert (shorter.loc["two_ended"] < 0).all(), "the budget pays for shorter tables, here less than a block"
