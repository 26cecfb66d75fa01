"""A user adds an experiment, a workload, a model and a strategy from a folder of their own, as the pages in docs/ say."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pandas as pd
from command_line import ROOT, run
from omegaconf import OmegaConf

from hybridcache import LLM, SamplingParams
from hybridcache.strategies.check import PROPERTIES

PAGES = ("adding_an_experiment", "adding_a_workload", "adding_a_model", "strategies")
CARVED = "_target_: hybridcache.strategies.shared_pool.SharedPool\nmode: carve\n"
NAMED = r"((?:# @package \S+\n)?# my_lab/(\S+\.(?:py|yaml))\n.*?)"
BLOCK = re.compile(rf"^```(?:python|yaml)\n{NAMED}^```$", re.MULTILINE | re.DOTALL)


def files() -> dict[str, str]:
    """The pages' blocks that begin with the name of a file, as they stand, and a strategy."""
    found = {"lab/__init__.py": "", "conf/strategy/carved.yaml": CARVED}
    for page in PAGES:
        blocks = BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())
        assert blocks, page
        found |= {name: text for text, name in blocks}
    named = {"conf/experiment/doubling.yaml", "lab/doubling.py", "conf/workload/bursts.yaml", "lab/workloads.py"}
    assert named | {"conf/model/slim.yaml", "conf/strategy/regions.yaml", "regions.py", "generate.py"} <= set(found)
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
        "model=slim", "strategies=[carved,regions]", "+strategy_options.regions.region_tokens=64", "capacity.budget_gib=0.01",
        "simulation.budget_gib=0.01", "simulation.repetitions=2", "seed=7", "inference.max_output=4", "inference.max_prompt=40",
    )  # fmt: skip
    simulation = rows[rows["phase"] == "simulation"]
    for _, of_strategy in simulation.groupby("strategy"):
        assert list(of_strategy["seed"]) == [7, 8]
        assert list(of_strategy["workload_source"]) == ["bursts seed=7", "bursts seed=8"]
    inference = rows[rows["phase"] == "inference"]
    assert set(inference["strategy"]) == set(simulation["strategy"]) == {"carved", "regions"}
    assert inference["tokens_sha256"].nunique() == 1, "the same tokens, wherever states lie"
    assert simulation["prompt_tokens"].nunique() == 2, "another seed is another stream"
    assert set(rows["model"]) == {"slim"}, "one model in all phases"
    refused = rows[rows["requests_offered"] > rows["requests_served"]]
    assert set(refused["workload"]) == {"length=8192", "length=32768"}, "the model's positions end at 4096"
    assert set(refused["phase"]) == {"capacity"}
    assert set(simulation["num_devices"]) == {1}
    assert recorded.workload.seed == 7
    assert recorded.inference.model == "slim"


def test_the_page_on_strategies_checks_and_generates(tmp_path):
    here = folder(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{ROOT}"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=here, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    checked = python("-m", "hybridcache.strategies.check", "regions.Regions", "region_tokens=64").splitlines()
    assert len(checked) == len(PROPERTIES)
    assert all(line.startswith("ok ") for line in checked)
    ours = LLM("tiny", strategy="shared_pool", cache_bytes=4 << 20)
    outputs = ours.generate(["Memory is", [1, 2, 3]], SamplingParams(max_tokens=16), progress=False)
    assert python("generate.py").splitlines() == [str(output.token_ids) for output in outputs]


def code(page: str) -> str:
    """The page's one Python block."""
    (found,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return found


def test_the_page_on_serving_resumes_a_prompt(capsys):
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE | re.DOTALL)
    exec("\n".join(blocks), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["107", "[100, 64]"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[5:] == ["True"]
    fresh = LLM("tiny", cache_bytes=8 << 20)
    prompts = [[*names["system"], 30, 31], [*names["system"][:99], 1, 2]]
    outputs = fresh.generate(prompts, SamplingParams(max_tokens=8), progress=False)
    assert [output.token_ids for output in names["outputs"]] == [output.token_ids for output in outputs]
    assert names["llm"].strategy.usage().cached > 0
    names["llm"].strategy.check_integrity()


def test_the_readme_generates(capsys):
    exec(code("README.md"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        ids, reason, seconds = re.fullmatch(r"\[(.*)\] (length|stop) ([\d.]+)", line).groups()
        assert len(ids.split(",")) == 16 or reason == "stop"
        assert float(seconds) > 0
