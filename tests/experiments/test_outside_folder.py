"""A user adds an experiment, a workload, a model and a strategy from a folder of their own, as the pages in docs/ say."""

import json
import textwrap

import pandas as pd
from command_line import ROOT, run
from omegaconf import OmegaConf

FILES = {
    "conf/workload/bursts.yaml": """
        _target_: lab.workloads.bursts
        name: bursts
        count: 6
        seed: ${seed}
    """,
    "lab/workloads.py": '''
        import random

        from hybridcache.workloads import Request, Workload


        def bursts(*, count: int, seed: int = 0) -> Workload:
            """Three requests at once, every second."""
            draw = random.Random(seed)
            requests = tuple(Request(i, float(i // 3), draw.randint(10, 300), 5) for i in range(count))
            return Workload("bursts", f"bursts seed={seed}", requests)
    ''',
    "conf/model/slim.yaml": """
        name: slim
        hf_config:
          model_type: qwen3_next
          vocab_size: 272
          hidden_size: 32
          intermediate_size: 64
          num_hidden_layers: 4
          full_attention_interval: 4
          num_attention_heads: 2
          num_key_value_heads: 1
          head_dim: 16
          rope_parameters: {rope_type: default, rope_theta: 10000.0, partial_rotary_factor: 0.25}
          linear_conv_kernel_dim: 4
          linear_key_head_dim: 16
          linear_value_head_dim: 16
          linear_num_key_heads: 1
          linear_num_value_heads: 2
          moe_intermediate_size: 16
          shared_expert_intermediate_size: 16
          num_experts_per_tok: 1
          num_experts: 2
          norm_topk_prob: true
          max_position_embeddings: 4096
    """,
    "conf/strategy/carved.yaml": """
        _target_: hybridcache.strategies.shared_pool.SharedPool
        mode: carve
    """,
    "conf/experiment/doubling.yaml": """
        # @package _global_
        experiment_name: lab.doubling
        strategies: [shared_pool, carved]
        strategy_options: {}
        doubling:
          start_gib: 0.001
          times: 3
    """,
    "lab/__init__.py": "",
    "lab/doubling.py": '''
        """How many requests of 100 tokens fit as the budget doubles?"""

        from dataclasses import dataclass
        from typing import Any

        from experiments.lib import settings
        from experiments.lib.harness import write_results
        from experiments.lib.settings import container
        from experiments.lib.strategy_choices import CacheMemory, choose_strategies
        from hybridcache.sim.capacity import residents
        from hybridcache.spec import CacheSpec


        @dataclass
        class Doubling:
            start_gib: float
            times: int


        @dataclass
        class Config(settings.Common):
            model: settings.Model
            strategies: list[str]
            strategy_options: dict[str, Any]
            doubling: Doubling


        def run(cfg, run_dir):
            spec = CacheSpec.from_config(container(cfg.model.hf_config))
            rows = []
            for choice in choose_strategies(cfg):
                for k in range(cfg.doubling.times):
                    memory = CacheMemory(spec, int(cfg.doubling.start_gib * 2**30) << k)
                    count, usage = residents(lambda: choice.build(memory), 100)
                    rows.append({"phase": "doubling", "workload": f"x{2**k}", "repetition": 0, "residents": count,
                                 "budget_bytes": usage.budget, **memory.columns(), **choice.columns()})
            return write_results(rows, run_dir)
    ''',
}


def folder(path):
    for name, text in FILES.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip())
    return path


def outside(tmp_path, *arguments):
    here = folder(tmp_path)
    out = here / "out"
    options = ("--config-dir", str(here / "conf"), "tracking=disabled", f"hydra.run.dir={out}")
    done = run(*options, *arguments, PYTHONPATH=f"{here}:{ROOT}")
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(out / "results.parquet"), OmegaConf.load(out / "config.yaml")


def test_an_experiment_with_a_model_and_a_strategy(tmp_path):
    rows, recorded = outside(tmp_path, "+experiment=doubling", "model=slim", "doubling.times=2")
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
        "+experiment=shared_pool", "workload=bursts", "model=slim", "strategies=[carved]", "capacity.budget_gib=0.01",
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
