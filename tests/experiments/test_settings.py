"""What ``config.yaml`` records is what runs: every ``auto`` resolved, one key for one thing in all phases."""

import re

import pytest
from command_line import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import shared_pool
from experiments.lib.harness import experiment_module, settings_of
from experiments.lib.settings import check_model_fields, max_request_tokens, scheduler_config
from experiments.lib.strategy_choices import choose_strategies
from hybridcache.errors import UserError
from models.configs import shipped_fields


def recorded(experiment: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"+experiment={experiment}", *overrides])
    return settings_of(experiment_module(cfg.experiment_name), cfg, overrides)


def test_serving_runs_what_the_command_line_says() -> None:
    options = (
        "model=qwen3_next_8l",
        "state_dtype=bf16",
        "kv_dtype=float32",
        "engine.max_tokens_per_step=77",
        "serving.device=cpu",
    )
    cfg = recorded("serve_throughput", *options)
    assert (cfg.serving.model, cfg.model.name, cfg.model.hf_config.num_hidden_layers) == (
        "qwen3_next_8l",
        "qwen3_next_8l",
        8,
    )
    for section in (cfg, cfg.serving):
        assert (section.state_dtype, section.kv_dtype) == ("bfloat16", "float32")
    assert cfg.engine.max_tokens_per_step == cfg.serving.max_tokens_per_step == 77
    for absent in ("workload", "device", "tp_size"):
        assert absent not in cfg


def test_auto_is_resolved_by_the_device() -> None:
    cfg = recorded("serve_throughput", "serving.device=cpu")
    assert "model" not in cfg, "nobody chose one: the section says which runs"
    assert (cfg.serving.model, cfg.serving.dtype, cfg.kv_dtype, cfg.state_dtype) == (
        "tiny",
        "float32",
        "float32",
        "float32",
    )
    assert cfg.engine.max_tokens_per_step == 256
    assert cfg.serving.cache_bytes == 2 << 20
    assert set(cfg.serving.workloads) == {"bs1", "chat", "short", "long", "mixed"}


def test_all_phases_share_model_dtypes_and_token_budget() -> None:
    options = (
        "model=tiny",
        "state_dtype=bfloat16",
        "kv_dtype=fp32",
        "engine.max_tokens_per_step=512",
        "inference.device=cpu",
    )
    cfg = recorded("shared_pool", *options)
    for section in (cfg, cfg.inference):
        assert (section.state_dtype, section.kv_dtype) == ("bfloat16", "float32")
    assert cfg.engine.max_tokens_per_step == cfg.inference.max_tokens_per_step == 512
    assert cfg.model.name == cfg.inference.model == "tiny"
    assert cfg.tp_size == 1


def test_the_default_simulates_a_machine_that_exists() -> None:
    cfg = recorded("shared_pool", "inference.device=cpu")
    assert (cfg.model.name, cfg.tp_size, cfg.kv_dtype, cfg.state_dtype) == (
        "qwen3_next_80b_a3b",
        4,
        "bfloat16",
        "float32",
    )
    assert cfg.engine.max_tokens_per_step == 8192
    found = cfg.inference
    assert (found.model, found.dtype, found.kv_dtype, found.state_dtype) == ("tiny", *["float64"] * 3)
    assert found.max_tokens_per_step == 128


@pytest.mark.parametrize(("given", "tokens"), [("null", 262_144), ("600", 600), ("262144", 262_144)])
def test_the_longest_request_is_the_configurations_or_the_models(given: str, tokens: int) -> None:
    cfg = recorded("shared_pool", "phases=[simulation]", f"engine.max_model_len={given}")
    assert shared_pool._memory(cfg, 1).max_request_tokens == tokens
    assert scheduler_config(cfg).max_running == cfg.engine.max_running == 256


def test_a_model_that_does_not_say_its_longest_request_takes_any() -> None:
    cfg = OmegaConf.create({"engine": {"max_model_len": None}})
    assert max_request_tokens(cfg, "mine", None) is None
    cfg.engine.max_model_len = 10**6
    assert max_request_tokens(cfg, "mine", None) == 10**6
    cfg.engine.max_model_len = 0
    with pytest.raises(UserError, match=r"engine\.max_model_len=0: give a number of tokens of at least 2, or null"):
        max_request_tokens(cfg, "mine", None)


@pytest.mark.parametrize("budget", [1, 10, 30])
def test_a_budget_sweep_keeps_the_machine(budget: int) -> None:
    cfg = recorded("shared_pool", "phases=[simulation]", f"simulation.budget_gib={budget}")
    assert cfg.tp_size == 4


@pytest.mark.parametrize(
    ("phase", "absent"),
    [
        ("capacity", {"simulation", "inference", "workload", "device", "seed"}),
        ("simulation", {"capacity", "inference"}),
        ("inference", {"capacity", "simulation", "tp_size", "device", "model"}),
    ],
)
def test_the_record_holds_what_the_phases_read(phase: str, absent: set[str]) -> None:
    options = ("tp_size=4",) if phase == "capacity" else ()
    cfg = recorded("shared_pool", f"phases=[{phase}]", "strategies=[shared_pool]", *options)
    assert phase in cfg
    every = ("capacity", "simulation", "inference", "workload", "device", "seed", "tp_size", "model")
    assert {key for key in every if key not in cfg} == absent


def test_the_short_form_is_recorded_as_it_runs() -> None:
    cfg = recorded("shared_pool", "fast=true")
    assert (cfg.simulation.num_requests, cfg.capacity.lengths, cfg.inference.num_requests) == (40, [12, 2000], 6)


def test_geometry_resolves_its_own() -> None:
    cfg = recorded("geometry")
    assert (cfg.model.name, cfg.kv_dtype, cfg.state_dtype, cfg.tp_size) == (
        "qwen3_next_80b_a3b",
        "bfloat16",
        "float32",
        1,
    )
    assert set(cfg) == {
        "model",
        "kv_dtype",
        "state_dtype",
        "tp_size",
        "geometry",
        "experiment_name",
        "tracking",
        "fast",
    }


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["shared_pool", "two_ended", "shared_pool"], {}, "strategies='shared_pool': is named twice"),
        (["shared_pool"], {"two_ended": {"page_size": 16}}, "strategy_options='two_ended': is not in strategies="),
    ],
)
def test_a_comparison_names_each_strategy_once_and_no_options_of_others(names, options, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        choose_strategies(OmegaConf.create({"strategies": names, "strategy_options": options}))
    (one,) = choose_strategies(OmegaConf.create({"strategies": names[:1], "strategy_options": {}}))
    assert one.label == names[0]


def test_a_misspelt_field_of_a_model_is_refused() -> None:
    check_model_fields(shipped_fields("tiny"))
    check_model_fields({**shipped_fields("tiny"), "my_own_note": 1})
    with pytest.raises(UserError, match=r"model.hf_config.hidden_ac='silu': .* did you mean hidden_act\?"):
        check_model_fields({**shipped_fields("tiny"), "hidden_ac": "silu"})
