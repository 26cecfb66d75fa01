"""Tracking: offline writes a run below the run directory, disabled never imports wandb, a failure loses nothing."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from limits import SUBPROCESS_S
from synthetic_run import write_run

import hybridcache
from hybridcache.errors import UserError
from hybridcache.observe.report import write_report
from hybridcache.observe.tracking import MAX_POINTS, Tracker, WandbTracker, make_tracker

ROOT = Path(hybridcache.__file__).parent.parent
CONFIG = {"experiment_name": "synthetic", "model": {"name": "tiny"}, "seed": 0}


def small_run(path, **options):
    return write_run(path, workloads=("chat",), requests=12, budget_bytes=1 << 28, **options)


def start(run_dir, **tracking):
    return make_tracker({"mode": "offline", **tracking}, run_dir, CONFIG)


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """No login, no settings of the person who runs the tests, and a home that shows what is written to it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path


PROGRAM = """
import sys
from pathlib import Path
import pandas as pd
from hybridcache.observe.tracking import make_tracker
path = Path(sys.argv[2])
config = {"experiment_name": "synthetic", "model": {"name": "tiny"}}
tracker = make_tracker({"mode": sys.argv[1]}, path, config)
tracker.log_run(path, pd.read_parquet(path / "results.parquet"))
tracker.finish()
tracker.finish()
print("wandb" in sys.modules, getattr(tracker, "error", None))
"""


def track(mode, run_dir):
    """Track a run in a process of its own. A child of it that lived on would hold the pipes, and this would not return."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(run_dir)], capture_output=True, text=True, timeout=SUBPROCESS_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "tracking is quiet"
    return done.stdout.strip()


def test_offline_writes_a_run_below_the_run_directory_and_leaves_no_process(isolated):
    run_dir = small_run(isolated / "run", phases=("capacity", "simulation"))
    write_report(run_dir)
    before = set(run_dir.rglob("*"))
    assert track("offline", run_dir) == "True None"
    (record,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for text in (b"simulation/shared_pool/chat.0/useful_bytes", b"simulation/byte_exact/chat.0/time_s", b"report.html"):
        assert text in content, text
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/results_*.table.json")
    logged = json.loads(table.read_text())
    results = pd.read_parquet(run_dir / "results.parquet")
    assert logged["columns"] == list(results.columns)
    assert len(logged["data"]) == len(results)
    assert {file for file in run_dir.rglob("*") if "wandb" not in file.relative_to(run_dir).parts} == before
    ours = {file.read_bytes() for file in before if file.is_file()}
    assert not [file for file in (isolated / "data").rglob("*") if file.is_file() and file.read_bytes() in ours]


class Recorded:
    """Stands for a W&B run: keeps what it is given."""

    def __init__(self):
        self.metrics, self.rows, self.summary = {}, [], {}

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def log(self, row):
        self.rows.append(row)


def test_series_run_over_their_own_time_and_are_thinned(tmp_path):
    run_dir = small_run(tmp_path / "run", phases=("simulation",), repetitions=2)
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._run = Recorded()
    tracker._log_series(run_dir / "events.jsonl")
    for repetition in (0, 1):
        prefix = f"simulation/shared_pool/chat.{repetition}"
        assert tracker._run.metrics[f"{prefix}/*"]["step_metric"] == f"{prefix}/time_s"
        times = [row[f"{prefix}/time_s"] for row in tracker._run.rows if f"{prefix}/time_s" in row]
        assert times == sorted(times)
        assert 2 < len(times) <= MAX_POINTS
    assert all(len({name.rpartition("/")[0] for name in row}) == 1 for row in tracker._run.rows)


def test_refusals_stand_in_the_summary(tmp_path):
    results = pd.read_parquet(small_run(tmp_path / "run", phases=("simulation",)) / "results.parquet")
    results["requests_refused"] = range(len(results))
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._run = Recorded()
    tracker._log_results(results)
    for i, name in enumerate(results["strategy"]):
        assert tracker._run.summary[f"simulation/{name}/chat.0/requests_refused"] == i
    assert "requests_refused" in tracker._run.rows[0]["results"].columns


def test_disabled_does_not_import_wandb(tmp_path):
    run_dir = small_run(tmp_path / "run", phases=("capacity",))
    before = set(run_dir.rglob("*"))
    assert track("disabled", run_dir) == "False None"
    assert set(run_dir.rglob("*")) == before


def test_a_tracker_that_cannot_start_says_so_and_loses_nothing(isolated, caplog):
    run_dir = small_run(isolated / "run", phases=("capacity",))
    before = (run_dir / "results.parquet").read_bytes()
    with caplog.at_level(logging.WARNING):
        tracker = start(run_dir, project="no/such:project?")
        tracker.log_run(run_dir, pd.read_parquet(run_dir / "results.parquet"))
        tracker.finish()
    assert tracker.error is not None
    assert "tracking could not start the run" in caplog.text
    assert str(run_dir) in caplog.text
    assert (run_dir / "results.parquet").read_bytes() == before


def test_a_tracker_that_breaks_midway_goes_on_and_says_what_failed(tmp_path, caplog):
    run_dir = small_run(tmp_path / "run", phases=("simulation",))
    tracker = WandbTracker.__new__(WandbTracker)
    tracker.run_dir, tracker.error, tracker._run = run_dir, None, Recorded()  # lacks log_artifact and finish
    with caplog.at_level(logging.WARNING):
        tracker.log_run(run_dir, pd.read_parquet(run_dir / "results.parquet"))
        tracker.finish()
    assert "could not store the files of the run" in caplog.text
    assert "could not finish the run" in caplog.text
    assert tracker._run is None


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tracking\.mode='on': choose one of offline, online, disabled"):
        make_tracker({"mode": "on"}, tmp_path, {})


@pytest.mark.parametrize("mode", ["offline", "online", "disabled"])
def test_configuration_files_name_their_mode(mode):
    assert yaml.safe_load((ROOT / "conf" / "tracking" / f"{mode}.yaml").read_text())["mode"] == mode


def test_disabled_tracks_nothing(tmp_path):
    assert type(make_tracker({"mode": "disabled"}, tmp_path, {})) is Tracker
