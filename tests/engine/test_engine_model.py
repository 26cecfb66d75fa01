"""Engine and Qwen3-Next in float64: the same tokens under every physical strategy, whatever the batches were."""

import random
from dataclasses import replace

import pytest
import torch
from pool_model import smallest_budget
from test_checkpoints import share_states
from test_graphs import Recorded

from hybridcache.engine.engine import Engine
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import make_backend
from hybridcache.memory.pool import POISON_BYTE
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config
from models.qwen3_next import build_model

STRATEGIES = {
    "shared_pool": ("shared_pool", {"placement_seed": 1}),
    "shared_pool_carve": ("shared_pool", {"mode": "carve", "placement_seed": 2}),
    "large_block": ("large_block", {}),
    "padded_page": ("padded_page", {"placement_seed": 3}),
    "static_split": ("static_split", {"ratio": 3.0}),
    "two_ended": ("two_ended", {}),
}
LENGTHS = [78, 79, 38, 1, 64, 118]
"""Prompts that grow over a block's boundary soon, so that a tight pool preempts."""


class Case:
    """A model with random weights, a random stream, and its tokens when each request runs alone."""

    def __init__(self, seed: int) -> None:
        config = shipped_config("tiny")
        # Weights strong enough that tokens depend on the whole context (Transformers' 0.02 gives nearly constant ones).
        config.initializer_range = 0.3
        self.seed = seed
        self.model = build_model(config, "float64", "cpu", seed=seed)
        self.spec = CacheSpec.from_config(config, kv_dtype="float64", state_dtype="float64")
        rng = random.Random(seed)
        self.requests = [
            (
                [rng.randrange(config.vocab_size) for _ in range(length)],
                SamplingParams(max_tokens=30, temperature=0.9 * (i % 2), seed=i),
            )
            for i, length in enumerate(LENGTHS)
        ]
        engine = self.engine("shared_pool", 1 << 24, None)
        self.expected = []
        for prompt, params in self.requests:
            sequence = engine.add_request(prompt, params)
            engine.run()
            self.expected.append(sequence.output_ids)

    def strategy(self, label: str, budget: int):
        name, options = STRATEGIES[label]
        return build(name, spec=self.spec, budget_bytes=budget, physical=True, **options)

    def engine(self, label: str, budget: int, config: SchedulerConfig | None, **options) -> Engine:
        backend = make_backend("torch", "cpu")
        return Engine(self.model, self.strategy(label, budget), config, backend, poison=True, **options)


@pytest.fixture(scope="module")
def case() -> Case:
    torch.set_num_threads(1)
    return Case(random.randrange(2**32))


@pytest.mark.parametrize("mode", ["eager", "overlap", "overlap_graphs"])
@pytest.mark.parametrize("label", STRATEGIES)
def test_tokens_equal_those_of_requests_run_alone(label, mode, case):
    longest = max(len(prompt) + params.max_tokens for prompt, params in case.requests)
    budget = int(1.7 * smallest_budget(lambda budget: case.strategy(label, budget), longest))
    engine = case.engine(label, budget, SchedulerConfig(max_tokens_per_step=96), overlap=mode != "eager")
    if mode == "overlap_graphs":
        engine.runner.graphs = engine.runner._make_graphs(Recorded)
    sequences = [engine.add_request(prompt, params) for prompt, params in case.requests]
    engine.run()
    assert [sequence.output_ids for sequence in sequences] == case.expected, f"seed {case.seed}"
    assert engine.scheduler.num_preemptions > 0, f"seed {case.seed}: the budget was not tight"
    assert engine.backend.launches["gdn_decode[torch]"] > 0
    engine.strategy.check_integrity()
    assert not engine.strategy.residents


@pytest.mark.parametrize("label", STRATEGIES)
def test_tokens_are_the_same_when_every_step_writes_states_elsewhere(label, case):
    """A cached owner shares every resident's states after every step, so that no step updates a state in place."""
    longest = max(len(prompt) + params.max_tokens for prompt, params in case.requests)
    budget = 4 * smallest_budget(lambda budget: case.strategy(label, budget), longest)
    engine = case.engine(label, budget, SchedulerConfig(max_tokens_per_step=96))
    share_states(engine)
    sequences = [engine.add_request(prompt, params) for prompt, params in case.requests]
    engine.run()
    assert [sequence.output_ids for sequence in sequences] == case.expected, f"seed {case.seed}"
    assert engine.moved_states > 50
    engine.strategy.check_integrity()


@pytest.mark.parametrize("label", STRATEGIES)
def test_prompts_that_resume_from_checkpoints_give_the_same_tokens(label, case):
    """Every prompt once with checkpoints (inside its chunks and at its end), then everything again, from the checkpoints."""
    longest = max(len(prompt) + params.max_tokens for prompt, params in case.requests)
    budget = 8 * smallest_budget(lambda budget: case.strategy(label, budget), longest)
    engine = case.engine(label, budget, SchedulerConfig(max_tokens_per_step=96))
    asking = [
        (prompt[:-1], replace(params, max_tokens=1, checkpoint_at=tuple({64, len(prompt) - 1} & {*range(len(prompt))})))
        for prompt, params in case.requests
        if len(prompt) > 1
    ]
    for prompt, params in asking:
        engine.add_request(prompt, params)
    engine.run()
    sequences = [engine.add_request(prompt, params) for prompt, params in case.requests]
    engine.run()
    assert [sequence.output_ids for sequence in sequences] == case.expected, f"seed {case.seed}"
    assert engine.prefix.hit_tokens >= sum(len(prompt) - 1 for prompt, _ in case.requests if len(prompt) > 1) / 2
    engine.strategy.check_integrity()


def test_the_tokens_tell_contexts_apart(case):
    """Otherwise equal tokens would say nothing."""
    assert len({tuple(tokens[:8]) for tokens in case.expected}) == len(case.expected), case.seed
    assert all(len(set(tokens)) > 3 for tokens in case.expected), case.seed


def test_every_live_block_is_read(case):
    """No KV or state lives outside the pool: NaN in any one block of a resident reaches the logits."""
    prompt = case.requests[0][0]
    geometry = case.strategy("shared_pool", 1 << 24).geometry
    size = geometry.manager_block_bytes
    for index in range(geometry.request_blocks(len(prompt))):
        engine = _after_prefill(case, prompt)
        # Adjacent blocks of a request come as one span.
        blocks = [start for s in engine.strategy.spans() for start in range(s.offset, s.offset + s.num_bytes, size)]
        engine.runner.pool.buffer[blocks[index] : blocks[index] + size] = POISON_BYTE
        engine.run()
        assert engine.sequences[0].finish_reason == "error", f"seed {case.seed}, block at {blocks[index]}"
        assert len(engine.sequences[0].output_ids) == 1


def _after_prefill(case: Case, prompt: list[int]) -> Engine:
    engine = case.engine("shared_pool", 1 << 24, None)
    engine.add_request(prompt, SamplingParams(max_tokens=3))
    engine.step()
    return engine
