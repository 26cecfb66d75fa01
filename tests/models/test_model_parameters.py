"""Parameters of real configurations in the cost model: by hand, and plausible."""

from typing import Any

import pytest

from hybridcache.engine.sequence import Sequence
from hybridcache.engine.step import ScheduledTokens, Step
from hybridcache.errors import UserError
from hybridcache.sim.cost_model import CostModel, DeviceSpec, ModelParameters, least_ranks
from hybridcache.spec import CacheSpec
from models.configs import shipped_fields


def qwen3_next(**changes: Any) -> dict[str, Any]:
    return {**shipped_fields("qwen3_next_80b_a3b"), **changes}


def test_parameters_of_qwen3_next_80b() -> None:
    p = ModelParameters.from_config(qwen3_next())
    hidden, vocab, moe = 2048, 151_936, 512
    linear = hidden * (2 * 2048 + 2 * 4096) + hidden * 64 + 8192 * 4 + 2 * 32 + 128 + 4096 * hidden
    attention = hidden * (2 * 4096 + 2 * 512) + 4096 * hidden + 2 * 256
    every = 512 * hidden + 3 * hidden * 512 + hidden + 2 * hidden  # router, shared expert, its gate, norms
    assert p.dense == 36 * linear + 12 * attention + 48 * every + hidden
    assert p.head == vocab * hidden
    assert p.expert == 3 * hidden * moe
    assert (p.num_experts, p.experts_per_token, p.expert_layers) == (512, 10, 48)
    assert p.stored == p.dense + 2 * p.head + 48 * 512 * p.expert
    assert 79e9 < p.stored < 80e9
    assert 3.3e9 < p.active < 3.7e9


def test_tied_head_is_stored_once() -> None:
    changes = {"num_hidden_layers": 4, "num_experts": 8, "hidden_size": 64}
    untied, tied = (ModelParameters.from_config(qwen3_next(tie_word_embeddings=t, **changes)) for t in (False, True))
    assert untied.dense == tied.dense
    assert untied.head == tied.head == 151_936 * 64
    assert untied.stored - tied.stored == untied.head


def test_the_machine_depends_on_the_model_alone() -> None:
    """148.4 GiB of weights: two H100s would be filled to 93 %, four to 46 %."""
    config = qwen3_next()
    assert least_ranks(config, DeviceSpec()) == 4
    assert least_ranks(config, DeviceSpec(), weight_bytes=1.0) == 2
    assert least_ranks(config, DeviceSpec(memory_bytes=float(1 << 40))) == 1
    spec = CacheSpec.from_config(config, tp_size=4)
    for budget in (5 << 30, 30 << 30):
        assert CostModel.from_config(config, spec, cache_bytes=budget).label == "4 x H100"
    with pytest.raises(UserError, match=r"tp_size=4: a rank's 37.1 GiB of weights and 40.0 GiB of cache"):
        CostModel.from_config(config, spec, cache_bytes=40 << 30)
    with pytest.raises(UserError, match=r"tp_size=1: a rank's 148.4 GiB"):
        CostModel.from_config(config, CacheSpec.from_config(config))


def test_decode_of_the_80b_is_plausible() -> None:
    """Bounds that any H100 obeys: 64 decodes of 4,096 tokens read at least 100 GB of weights, KV and states. Four ranks store
    each of the two KV heads twice."""
    config = qwen3_next()
    spec = CacheSpec.from_config(config, tp_size=4)
    assert 4 * spec.kv_bytes_per_token == 2 * CacheSpec.from_config(config).kv_bytes_per_token
    model = CostModel.from_config(config, spec)
    step = Step([ScheduledTokens(Sequence(i, 4096, 9, num_output=1), 4096, 1) for i in range(64)])
    p = model.parameters
    touched = 512 * (1 - (1 - 10 / 512) ** 64) * 48 * p.expert * 2
    total = (p.dense + p.head) * 2 + touched + 4 * 64 * (4097 * spec.kv_bytes_per_token + 2 * spec.state_bytes)
    assert total > 100e9
    assert total / (4 * DeviceSpec().bandwidth) < model.step_s(step) < 2.5 * total / (4 * DeviceSpec().bandwidth)


def test_shipped_device_is_the_default_one() -> None:
    from pathlib import Path

    from omegaconf import OmegaConf

    path = Path(__file__).resolve().parents[2] / "conf" / "device" / "h100.yaml"
    assert DeviceSpec(**OmegaConf.to_container(OmegaConf.load(path))) == DeviceSpec()  # type: ignore[arg-type]
