"""What an engine says that it takes of its device, and what it refuses."""

import random
from dataclasses import replace

import pytest
import torch
from pool_model import PoolModel, pool_spec

from hybridcache.engine.engine import Engine
from hybridcache.engine.footprint import Memory
from hybridcache.engine.inputs import StepInputs, input_bytes
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.errors import UserError
from hybridcache.kernels.backend import make_backend
from hybridcache.llm import LLM
from hybridcache.strategies import build
from models.configs import shipped_config
from models.qwen3_next import build_model
from models.qwen3_next.workspace import scratch_bytes


def test_static_inputs_are_counted_to_the_byte():
    for _ in range(20):
        rows, tokens, states, entries = (random.randint(1, most) for most in (300, 9000, 40, 500))
        inputs = StepInputs(rows, tokens, states, entries, torch.device("cpu"))
        taken = sum(tensor.nbytes for tensor in (inputs.feed, inputs.table, inputs.sampled))
        # Beside the rows' numbers, which are another array.
        assert taken + 4 * rows <= input_bytes(rows, tokens, 2 * states + entries) <= taken + 16 * rows


def test_parts_add_up_and_more_than_there_is_is_refused(monkeypatch):
    memory = Memory(*(random.randint(1, 1 << 30) for _ in range(6)))
    assert memory.total_bytes == memory.weight_bytes + memory.cache_bytes + memory.workspace_bytes
    needed = memory.cache_bytes + memory.workspace_bytes
    monkeypatch.setattr("hybridcache.engine.footprint.room_on", lambda device: (needed, "free here"))
    memory.require(7, torch.device("cpu"))
    with pytest.raises(
        UserError, match=rf"budget_bytes=7: takes {memory.cache_bytes + 1} bytes.*free here is {needed}"
    ):
        replace(memory, cache_bytes=memory.cache_bytes + 1).require(7, torch.device("cpu"))


def test_the_workspace_is_everything_beside_weights_and_cache():
    memory = Memory(
        weight_bytes=1, cache_bytes=2, input_bytes=4, logits_bytes=8, graph_bytes=16, step_bytes=32, reserve_bytes=64
    )
    assert (memory.workspace_bytes, memory.total_bytes) == (4 + 8 + 16 + 32 + 64, 127)


def test_an_engine_that_does_not_fit_is_refused_before_it_takes_anything(monkeypatch):
    monkeypatch.setattr("hybridcache.engine.footprint.room_on", lambda device: (1 << 20, "free here"))
    monkeypatch.setattr("hybridcache.engine.runner.CachePool", None)
    strategy = build("shared_pool", spec=pool_spec(), budget_bytes=1 << 20, physical=True)
    with pytest.raises(UserError, match="budget_bytes=1048576"):
        Engine(PoolModel(), strategy, SchedulerConfig(), make_backend("torch", "cpu"))
    with pytest.raises(UserError, match=r"cache_bytes=4194304: takes .* steps take"):
        LLM("tiny", cache_bytes=4 << 20, device="cpu")


def test_an_engine_tells_its_memory():
    config = shipped_config("tiny")
    model = build_model(config, "float32", "cpu", seed=0)
    llm = LLM("tiny", cache_bytes=4 << 20, device="cpu", max_tokens_per_step=256)
    memory = llm.engine.memory
    assert memory.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert memory.cache_bytes == llm.engine.runner.pool.buffer.numel() <= 4 << 20
    assert memory.step_bytes >= model.scratch_bytes(256, *[llm.engine.runner.max_rows] * 2)
    assert memory.graph_bytes == memory.logits_bytes == 0, "there are no graphs on a CPU"


def test_scratch_grows_with_tokens_and_rows():
    config = shipped_config("qwen3_next_8l")
    shapes = ((1, 1, 0), (256, 256, 0), (256, 256, 256), (8192, 1, 1), (8192, 256, 256))
    found = [scratch_bytes(config, torch.bfloat16, *shape) for shape in shapes]
    assert found == sorted(found)
    assert found[-1] < 3 << 30
