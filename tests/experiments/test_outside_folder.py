"""A user adds an experiment, a workload, a model and a strategy from a folder of their own, as the pages in docs/ say."""

import json
import re

import pandas as pd
from command_line import ROOT, run
from omegaconf import OmegaConf

PAGES = ("adding_an_experiment", "adding_a_workload", "adding_a_model")
CARVED = "_target_: hybridcache.strategies.shared_pool.SharedPool\nmode: carve\n"


def files() -> dict[str, str]:
    """The pages' blocks that begin with the name of a file, and a strategy."""
    found = {"lab/__init__.py": "", "conf/strategy/carved.yaml": CARVED}
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for name, block in re.findall(
            r"```(?:python|yaml)\n# (?:my_lab/)?(\S+\.(?:py|yaml))\n(.*?)```", text, re.DOTALL
        ):
            found[name] = block
    assert {"lab/doubling.py", "lab/workloads.py", "conf/model/slim.yaml", "conf/workload/bursts.yaml"} <= set(found)
    return found


def folder(path):
    for name, text in files().items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def outside(tmp_path, *arguments):
    here = folder(tmp_path)
    out = here / "out"
    options = ("--config-dir", str(here / "conf"), "tracking=disabled", f"hydra.run.dir={out}")
    done = run(*options, *arguments, PYTHONPATH=f"{here}:{ROOT}")
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(out / "results.parquet"), OmegaConf.load(out / "config.yaml")


def test_an_experiment_with_a_model_and_a_strategy(tmp_path):
    small = ("doubling.times=2", "doubling.start_gib=0.001")
    rows, recorded = outside(tmp_path, "+experiment=doubling", "model=slim", "strategies=[shared_pool,carved]", *small)
    assert set(rows["strategy"]) == {"shared_pool", "carved"}
    for _, of_strategy in rows.groupby("strategy"):
        assert list(of_strategy["residents"].diff().dropna() > 0) == [True]
    assert json.loads(rows.set_index("strategy").loc["carved", "strategy_options"].iloc[0]) == {"mode": "carve"}
    assert set(recorded) == {
        "experiment_name",
        "tracking",
        "fast",
        "model",
        "strategies",
        "strategy_options",
        "doubling",
    }
    assert recorded.model.name == "slim"


def test_a_workload_a_model_and_a_strategy_in_a_shipped_experiment(tmp_path):
    rows, recorded = outside(
        tmp_path,
        "+experiment=shared_pool", "workload=bursts", "workload.count=6",
        "model=slim", "strategies=[carved]", "capacity.budget_gib=0.01",
        "simulation.budget_gib=0.01", "simulation.repetitions=2", "seed=7", "inference.max_output=4", "inference.max_prompt=40",
    )  # fmt: skip
    simulation = rows[rows["phase"] == "simulation"]
    assert list(simulation["seed"]) == [7, 8]
    assert list(simulation["workload_source"]) == ["bursts seed=7", "bursts seed=8"]
    assert simulation["prompt_tokens"].nunique() == 2, "another seed is another stream"
    assert set(rows["model"]) == {"slim"}, "one model in all phases"
    assert set(rows["requests_offered"] - rows["requests_served"]) == {0}
    assert set(simulation["num_devices"]) == {1}
    assert recorded.workload.seed == 7
    assert recorded.inference.model == "slim"
