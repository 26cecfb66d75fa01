"""Scripts about the host and the engine, in short: what they time runs, and what they say adds up; what a record keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.engine import serve
from benchmarks.host import decode_step, measure
from hybridcache import LLM
from hybridcache.kernels.testing import attention_case, state_case
from hybridcache.memory.layout import Layout

ROOT = Path(__file__).resolve().parents[2]


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
    assert 0 < found["decode_host_ms"] <= found["decode_host_p90_ms"] <= found["decode_host_max_ms"]
    assert not llm.engine.has_work


def test_a_step_is_timed_by_one_command(tmp_path):
    options = ["--steps", "4", "--running", "3", "--mode", "carve", "--out", str(tmp_path / "host.json")]
    command = [sys.executable, "-m", "benchmarks.host", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["mode"], found["running"]) == ("carve", 3)
    kept = json.loads((tmp_path / "host.json").read_text())
    assert kept["median_ms"] == found["median_ms"] > 0
    assert kept["environment"]["device"]


def test_a_mixed_backend_has_what_is_asked_for():
    from tests.checks.precision import STATE, Mixed, variants, wide_add_norm

    generator = torch.Generator().manual_seed(1)
    attention = attention_case(generator, lengths=[9], kv_heads=1, k_dim=16, v_dim=16)
    state = state_case(generator, positions=[3], k_heads=1, v_heads=1, key_dim=16, value_dim=16)
    buffer = torch.cat([attention.buffer, state.buffer])
    layout = Layout(buffer.numel(), attention.layout, state.layout)
    plain = Mixed("torch").bind(buffer, layout)
    mixed = Mixed("torch", STATE, add_norm=wide_add_norm)
    found = mixed.bind(buffer, layout)
    assert mixed.add_norm is wide_add_norm
    mixed_counts = {name: mixed.launches[name] for name in mixed.launches}
    found.states[0].gdn_decode(*state.step(0)[2:])
    assert {name: mixed.launches[name] for name in mixed.launches} == mixed_counts, "another backend's operation"
    plain.states[0].gdn_decode(*state.step(0)[2:])
    assert plain.backend.launches["gdn_decode[torch]"] == 1
    assert set(variants("cpu")) >= {"engine", "all of these"}


def test_a_record_keeps_what_a_row_says(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rows = [{"phase": "a", "rate": 1.5, "note": None}, {"phase": "b", "rate": None, "note": "x"}]
    pd.DataFrame(rows).to_parquet(run_dir / "results.parquet")
    (run_dir / "environment.json").write_text(json.dumps({"commit": "abc"}))
    command = [sys.executable, "-m", "benchmarks.record", str(run_dir), "--name", "kept", "--to", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "kept.json").read_text())
    assert found["environment"] == {"commit": "abc"}
    assert found["results"] == [{"phase": "a", "rate": 1.5}, {"phase": "b", "note": "x"}]
