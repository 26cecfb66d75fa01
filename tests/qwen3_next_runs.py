"""What the Qwen3-Next tests share: random odd shapes, weights strong enough to tell tokens apart, and the smallest loop
that serves requests from a strategy's memory (no engine: chunks, batches and sampling are spelt out here)."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import Qwen3NextConfig

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.batch import StepBatch
from hybridcache.memory.pool import CachePool
from hybridcache.spec import CacheSpec
from hybridcache.strategies import build


def tiny_config(**changes) -> Qwen3NextConfig:
    """Four layers, one of them full attention; every size can be changed."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "num_experts": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return Qwen3NextConfig(**{**fields, **changes})


def spec_for(config: Qwen3NextConfig, dtype: str, state_dtype: str | None = None) -> CacheSpec:
    """Every cache in one dtype by default, so that a cached value is the computed one to the bit."""
    return CacheSpec.from_config(config, kv_dtype=dtype, state_dtype=state_dtype or dtype)


class Loop:
    """Serves requests from one strategy's poisoned memory, a hand-made :class:`StepBatch` at a time, on the model's
    device."""

    def __init__(
        self,
        model,
        strategy: str = "shared_pool",
        *,
        budget_bytes: int = 4 << 20,
        backend=None,
        state_dtype: str | None = None,
        **options,
    ) -> None:
        spec = spec_for(model.config, str(model.dtype).removeprefix("torch."), state_dtype)
        self.model = model
        self.strategy = build(strategy, spec=spec, budget_bytes=budget_bytes, physical=True, **options)
        self.pool = CachePool(self.strategy.layout, model.device, poison=True)
        self.backend = backend or Backend("torch")
        self.caches = self.backend.bind(self.pool.buffer, self.strategy.layout)
        self.tokens: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def admit(self, seq_id: int, tokens: Sequence[int]) -> None:
        assert self.strategy.admit(seq_id, 1), "the budget of this test is too small"
        self.tokens[seq_id], self.done[seq_id] = list(tokens), 0

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """Run the next ``counts[seq_id]`` tokens of each request. Returns their logits, ``[tokens, vocabulary]`` each.

        A request that has begun and runs one token is a decode row.
        """
        decode = [s for s, n in counts.items() if n == 1 and self.done[s] > 0]
        order = decode + [s for s in counts if s not in decode]
        for seq_id in order:
            assert self.strategy.grow(seq_id, self.done[seq_id] + counts[seq_id]), "the budget is too small"
        self.pool.apply(self.strategy.drain_moves())
        batch = self.batch(order, [counts[s] for s in order], len(decode))
        with torch.inference_mode():
            logits = self.model(batch, self.caches)
        parts = logits.split([counts[s] for s in order])
        for seq_id in order:
            self.done[seq_id] += counts[seq_id]
        return dict(zip(order, parts))

    def batch(self, order: list[int], counts: list[int], num_decode: int) -> StepBatch:
        tables = self.strategy.tables(order)
        states = torch.from_numpy(tables.state)
        starts = [self.done[s] for s in order]
        prefill = counts[num_decode:]
        ends = [start + count for start, count in zip(starts, counts)]
        batch = StepBatch(
            token_ids_T=torch.tensor([t for s, i, j in zip(order, starts, ends) for t in self.tokens[s][i:j]]),
            position_T=torch.cat([torch.arange(i, j) for i, j in zip(starts, ends)]),
            row_T=torch.arange(len(order), dtype=torch.int32).repeat_interleave(torch.tensor(counts)),
            kv_table_BN=torch.from_numpy(tables.kv),
            state_read_BL=states,
            state_write_BL=states,
            context_len_B=torch.tensor(ends, dtype=torch.int32),
            prefill_cu_seqlens=torch.tensor([0, *prefill], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            prefill_start_P=torch.tensor(starts[num_decode:], dtype=torch.int32),
            logit_index_R=torch.arange(sum(counts)),
            num_decode=num_decode,
            max_prefill_len=max(prefill, default=0),
            max_context_len=max(ends),
        )
        device = self.model.device
        return replace(batch, **{k: v.to(device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, rng: random.Random, longest_chunk: int = 23):
        """Greedy tokens of every prompt, and the logits of all its prompt tokens.

        Prompts are cut into chunks of random odd lengths, and requests run at their own pace: one decodes while others
        prefill.
        """
        prefill: dict[int, list[torch.Tensor]] = {}
        for seq_id, prompt in enumerate(prompts):
            self.admit(seq_id, prompt)
            prefill[seq_id] = []
        running = set(self.tokens)
        while running:
            counts = {}
            for seq_id in rng.sample(sorted(running), rng.randint(1, len(running))):
                left = len(self.tokens[seq_id]) - self.done[seq_id]
                counts[seq_id] = min(left, rng.randint(1, longest_chunk))
            for seq_id, logits in self.step(counts).items():
                prompt = len(prompts[seq_id])
                if len(prefill[seq_id]) < prompt:
                    prefill[seq_id] += list(logits)
                if self.done[seq_id] == len(self.tokens[seq_id]):
                    self.tokens[seq_id].append(int(logits[-1].argmax()))
                    if len(self.tokens[seq_id]) == prompt + new_tokens:
                        running.discard(seq_id)
                        self.strategy.release(seq_id)
            self.strategy.check_integrity()
        generated = [self.tokens[s][len(prompt) :] for s, prompt in enumerate(prompts)]
        return generated, [torch.stack(prefill[s]) for s in range(len(prompts))]
