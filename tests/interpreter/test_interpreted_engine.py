"""The engine on its Triton kernels, in Triton's interpreter: static rows with padding among them give the tokens of torch."""

import random

import torch

from hybridcache.engine.engine import Engine
from hybridcache.engine.inputs import padding_batch
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.kernels.backend import Backend
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build
from models.configs import shipped_config
from models.qwen3_next import build_model


class Recorded:
    """What a graph does, without a device: the function runs at every replay, and not at its capture."""

    def __init__(self, run) -> None:
        self.replay = run


def test_decode_on_static_rows():
    seed = random.SystemRandom().randrange(1 << 31)
    rng = random.Random(seed)
    config = shipped_config("tiny")
    config.initializer_range = 0.1
    # As few programs as there can be of every kernel, and states of two layers.
    config.layer_types = ["linear_attention", "full_attention", "linear_attention"]
    config.num_hidden_layers = len(config.layer_types)
    config.linear_num_key_heads, config.linear_num_value_heads = 1, 2
    config.linear_key_head_dim = config.linear_value_head_dim = 16
    model = build_model(config, "float32", "cpu", seed=seed)
    spec = CacheSpec.from_config(config, kv_dtype="float32", state_dtype="float32")
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (7, 3, 1)]
    found, kept = [], []
    for backend in (Backend("torch"), Backend("triton")):
        strategy = build("shared_pool", spec=spec, budget_bytes=1 << 22, physical=True, placement_seed=seed)
        engine = Engine(
            model, strategy, SchedulerConfig(max_running=5, max_tokens_per_step=64), backend, overlap=True, poison=True
        )
        if backend.name == "triton":
            engine.runner.graphs = engine.runner._make_graphs(Recorded)
            before = engine.runner.pool.buffer.clone()
            with torch.inference_mode():
                engine.runner._forward(padding_batch(2, 5, engine.runner.inputs.table))
            assert torch.equal(engine.runner.pool.buffer, before), "padding changed the cache"
        forward, logits = engine.runner._forward, []
        engine.runner._forward = lambda batch, forward=forward, logits=logits: (
            logits.append(forward(batch)) or logits[-1]
        )
        seqs = [engine.add_request(prompt, SamplingParams(max_tokens=3, ignore_eos=True)) for prompt in prompts]
        engine.run()
        assert engine.failed_steps == 0
        assert [seq.finish_reason for seq in seqs] == ["length"] * 3
        found.append([seq.output_ids for seq in seqs])
        # Warm-ups of graphs see nothing but padding; of a graph's rows the last is padding.
        kept.append([each[:3] for each in logits if each.shape[0] >= 3 and each[:3].unique(dim=0).shape[0] == 3])
    assert len(kept[0]) == len(kept[1]) == 3
    if found[0] == found[1]:  # float32 rounds differently, so a near tie may flip a token, and all after it
        for a, b in zip(*kept):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(kept[0][0], kept[1][0], rtol=1e-3, atol=1e-3)
