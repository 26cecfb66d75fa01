"""The geometry experiment: what it writes, and that it lists the planner's candidates."""

from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.geometry import run
from hybridcache.errors import UserError
from hybridcache.memory.geometry import plan
from hybridcache.spec import CacheSpec
from models.configs import shipped_fields

CONF = Path(__file__).resolve().parents[2] / "conf"


def config(name: str = "qwen3_next_80b_a3b", **overrides):
    base = OmegaConf.load(CONF / "experiment" / "geometry.yaml")
    chosen = {"model": OmegaConf.load(CONF / "model" / f"{name}.yaml")}
    rest = {"kv_dtype": "bfloat16", "state_dtype": "float32", "tp_size": 1, "fast": True}
    return OmegaConf.merge(base, chosen, rest, overrides)


@pytest.mark.parametrize(("model", "tp_size"), [("qwen3_next_80b_a3b", 4), ("bamba_9b", 1), ("lfm2_1_2b", 1)])
def test_it_lists_every_candidate_and_draws_them(tmp_path, capsys, model, tp_size):
    results = run(config(model, tp_size=tp_size), tmp_path)
    spec = CacheSpec.from_config(shipped_fields(model), tp_size=tp_size)
    found = plan(spec)
    assert list(results["rank"]) == list(range(1, len(found) + 1))
    assert list(results["manager_block_bytes"]) == [g.manager_block_bytes for g in found]
    assert list(results["blocks_at_12"]) == [g.request_blocks(12) for g in found]
    assert list(results["held_bytes_at_8192"]) == [g.request_blocks(8192) * g.manager_block_bytes for g in found]
    assert (results["held_bytes_at_12"] >= spec.request_bytes(12)).all()
    assert set(results["num_devices"]) == set(results["tp_size"]) == {tp_size}
    assert set(results["kv_dtype"]) == {"bfloat16"}
    assert set(results["device"]) == {"accounting"}
    written = pd.read_csv(tmp_path / "geometry.csv")
    pd.testing.assert_frame_equal(written, results, check_dtype=False)
    assert (tmp_path / "figures" / "geometry_padding.png").stat().st_size > 10_000
    drawn = pd.read_csv(tmp_path / "figures" / "geometry_padding.csv")
    assert drawn.loc[0, "rank"] == 1
    blocks = ["kernel_block_tokens", "manager_block_tokens"]
    best = results.groupby(blocks)["expected_waste_bytes"].min()
    assert dict(drawn.set_index(blocks)["expected_waste_bytes"]) == dict(best)
    printed = capsys.readouterr().out
    assert f"{model}, TP {tp_size}: {len(spec.state_layers)} states" in " ".join(printed.split())
    assert "…" not in printed, "nothing is cut at 80 columns"


def test_wrong_keys_are_refused_before_anything_is_written(tmp_path):
    for overrides, message in (
        ({"geometry": {"top": 0}}, r"^geometry.top=0: "),
        ({"geometry": {"lengths": [12, 0]}}, r"^geometry.lengths=\[12, 0\]: "),
        ({"tp_size": 3}, r"^tp_size=3: does not divide"),
        ({"model": {"hf_config": {"model_type": "llama"}}}, r"^model_type='llama': "),
    ):
        with pytest.raises(UserError, match=message):
            run(config(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_its_keys_compose_at_the_root():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["+experiment=geometry", "geometry.top=3"])
    assert (cfg.experiment_name, cfg.geometry.top) == ("geometry", 3)
