"""CostModel: seconds of one step from rooflines, in place of the model.

A step runs its operations one after another, so its time is the sum of the operations' times, and each operation takes the
larger of its bytes over bandwidth and its FLOPs over rate. With ``T`` tokens, ``R`` sampled tokens, ``n`` devices, and
``x`` an efficiency of :class:`DeviceSpec`:

=================  ===========================================  =========================================================
term               bytes                                        FLOPs
=================  ===========================================  =========================================================
dense              all dense weights                            2 T per dense weight
head               the output head, if R > 0                    2 R per weight of the head
experts            experts touched: per layer                   2 T k per weight of one expert, per layer
                   ``E (1 - (1 - k / E)^T)`` of E
attention_decode   KV of all tokens of every decoding row
attention_prefill  KV of all tokens of every prefilling row     2 (Dk + Dv) per query head, layer and (query, key) pair
state_decode       state read and written, every decoding row
state_prefill      state read (not at position 0) and written,  chunked rule: per head, layer and token
                   every prefilling row                         ``6 Dk Dv + 2 C (3 Dk + 2 Dv)``, C = 64
moves              twice what compaction relocated
overhead           constant: host, launches, sampling
collectives        if n > 1: two all-reduces of T x hidden per layer, each a latency and ``2 (n - 1) / n`` of its bytes
=================  ===========================================  =========================================================

The machine is ``n = tp_size`` devices, a tensor-parallel rank on each. Weights and FLOPs are divided by ``n``, as if all
work divided evenly; the cache's bytes are not, because a spec counts one rank's (KV heads that ranks replicate included).
Left out: activations, the embedding lookup, norms, the KV written, and routing that is not uniform (real routing touches
fewer experts). Decode is taken as bound by bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from hybridcache.engine.step import ScheduledTokens, Step
from hybridcache.errors import bad
from hybridcache.sim.device import DeviceSpec
from hybridcache.sim.parameters import ModelParameters
from hybridcache.spec import CacheSpec

__all__ = ["CostModel", "DeviceSpec", "ModelParameters", "StepWork", "least_ranks"]

GIB = 1 << 30
USABLE_MEMORY = 0.9
"""Of a device: weights and cache; the rest is for activations, workspaces and the driver (vLLM's default share, too)."""
DELTA_RULE_CHUNK = 64
"""Tokens of one chunk of the chunked delta rule."""


def least_ranks(hf_config: Any, device: DeviceSpec, weight_bytes: float = 2.0) -> int:
    """The least power of two of devices on which a model's weights take at most three quarters of the usable memory.

    It does not depend on the cache, so that a sweep over budgets stays on one machine.
    """
    needed = ModelParameters.from_config(hf_config).stored * weight_bytes
    n = 1
    while needed > 0.75 * USABLE_MEMORY * n * device.memory_bytes:
        n *= 2
    return n


@dataclass
class StepWork:
    """What a step does, in numbers of tokens and rows."""

    tokens: int = 0
    sampled: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    """Sum over decoding rows of the tokens in their cache, the new one included."""
    prefill_tokens: int = 0
    prefill_context: int = 0
    """The same sum over prefilling rows."""
    prefill_pairs: int = 0
    """(query, key) pairs of causal attention of the prefilling rows."""
    states_read: int = 0
    """Prefilling rows that continue from a state."""
    states_written: int = 0
    """Prefilling rows."""

    @classmethod
    def of(cls, items: Iterable[ScheduledTokens]) -> "StepWork":
        work = cls()
        decode_rows = decode_context = sampled = 0
        for item in items:
            start, num_tokens = item.start, item.num_tokens
            end = start + num_tokens
            seq = item.seq
            if end == seq.prompt_len + seq.num_output:
                sampled += 1
            if num_tokens == 1 and start:
                decode_rows += 1
                decode_context += end
                continue
            work.prefill_tokens += num_tokens
            work.prefill_context += end
            work.prefill_pairs += num_tokens * (start + end + 1) // 2
            work.states_read += start > 0
            work.states_written += 1
        work.decode_rows, work.decode_context, work.sampled = decode_rows, decode_context, sampled
        work.tokens = decode_rows + work.prefill_tokens
        return work


@dataclass(frozen=True)
class CostModel:
    """Rooflines of one model's step on ``spec.tp_size`` devices (see the module's table).

    Args:
        parameters: the model's weights.
        spec: the model's caches, on one of ``spec.tp_size`` ranks.
        device: of each rank.
        weight_bytes: of one weight; 2 for bf16.
    """

    parameters: ModelParameters
    spec: CacheSpec
    device: DeviceSpec
    weight_bytes: float = 2.0

    @classmethod
    def from_config(
        cls, hf_config: Any, spec: CacheSpec, device: DeviceSpec | None = None, *, cache_bytes: int = 0,
        weight_bytes: float = 2.0,
    ) -> "CostModel":  # fmt: skip
        """A cost model of a Hugging Face config.

        Args:
            hf_config: a Transformers config, or a mapping of its fields with ``model_type``.
            spec: of the same config; its ``tp_size`` is the number of devices.
            device: H100 where None.
            cache_bytes: the strategy's budget, of one rank.
            weight_bytes: of one weight.

        Raises:
            UserError: a device cannot hold its rank's weights and cache, or the config cannot be read.
        """
        device = device or DeviceSpec()
        parameters = ModelParameters.from_config(hf_config)
        weights = parameters.stored * weight_bytes / spec.tp_size
        if weights + cache_bytes > USABLE_MEMORY * device.memory_bytes:
            raise bad(
                "tp_size",
                spec.tp_size,
                f"a rank's {weights / GIB:.1f} GiB of weights and {cache_bytes / GIB:.1f} GiB of cache are more than "
                f"{USABLE_MEMORY:.0%} of one {device.name}'s {device.memory_bytes / GIB:.1f} GiB; give a smaller budget, more "
                "ranks, or tp_size=auto",
            )
        return cls(parameters, spec, device, weight_bytes)

    @property
    def num_devices(self) -> int:
        return self.spec.tp_size

    @property
    def label(self) -> str:
        """For results: ``H100`` or ``4 x H100``."""
        return self.device.name if self.num_devices == 1 else f"{self.num_devices} x {self.device.name}"

    def experts_touched(self, num_tokens: int) -> float:
        """Expected number of distinct experts of one layer that ``num_tokens`` tokens use, with uniform routing."""
        p = self.parameters
        if not p.num_experts:
            return 0.0
        return p.num_experts * (1.0 - (1.0 - p.experts_per_token / p.num_experts) ** num_tokens)

    def step_s(self, step: Step, bytes_moved: int = 0) -> float:
        """Seconds of one step.

        Args:
            step: as the scheduler returned it, before ``complete``.
            bytes_moved: what compaction relocated for it.
        """
        if step.cohort is not None:
            decode_s = self.decode_s(len(step.cohort.ids), int(step.cohort.totals.sum()))
            return decode_s + 2 * bytes_moved / self.device.bandwidth if bytes_moved else decode_s
        return sum(self.explain(step, bytes_moved).values())

    def decode_s(self, rows: int, context: Any) -> Any:
        """Seconds of a step in which ``rows`` requests decode and nothing else happens.

        Args:
            rows: at least one.
            context: tokens in their caches together, the new ones included; an array for several such steps.
        """
        fixed = self._decode_fixed.get(rows)
        if fixed is None:
            terms = self._terms(StepWork(tokens=rows, sampled=rows, decode_rows=rows), 0)
            self._decode_fixed[rows] = fixed = sum(terms.values())
        return fixed + context * self._rates.kv_token

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds by which a prefill of tokens ``start .. end - 1`` of one request prolongs a step that reads the weights
        anyway."""
        tokens = end - start
        work = StepWork(
            tokens=tokens, prefill_tokens=tokens, prefill_context=end, prefill_pairs=tokens * (start + end + 1) // 2,
            states_read=start > 0, states_written=1,
        )  # fmt: skip
        weights = self._terms(StepWork(), 0)
        return sum(self._terms(work, 0).values()) - sum(weights.values())

    def host_s(self, num_bytes: float) -> float:
        """Seconds of a copy of ``num_bytes`` of each rank between device and host, beside the steps."""
        return num_bytes / self.device.host_bandwidth

    @cached_property
    def _decode_fixed(self) -> dict[int, float]:
        """By the number of rows: seconds of all that does not depend on their contexts."""
        return {}

    def explain(self, step: Step, bytes_moved: int = 0) -> dict[str, float]:
        """Seconds by term; they add up to :meth:`step_s`, but for rounding."""
        return self._terms(StepWork.of(step.items), bytes_moved)

    def _terms(self, work: StepWork, bytes_moved: int) -> dict[str, float]:
        p, d, r = self.parameters, self.device, self._rates
        tokens = work.tokens
        expert_bytes = self.experts_touched(tokens) * p.expert_layers * p.expert * self.weight_bytes
        expert_flops = 2 * tokens * p.experts_per_token * p.expert_layers * p.expert
        terms = {
            "dense": max(p.dense * self.weight_bytes * r.dense_byte, 2 * p.dense * tokens * r.dense_flop),
            "head": max(p.head * self.weight_bytes * r.dense_byte, 2 * p.head * work.sampled * r.dense_flop)
            if work.sampled
            else 0.0,
            "experts": max(expert_bytes * r.expert_byte, expert_flops * r.expert_flop),
            "attention_decode": work.decode_context * r.kv_token,
            "attention_prefill": max(work.prefill_context * r.kv_token, work.prefill_pairs * r.attention_pair),
            "state_decode": 2 * work.decode_rows * r.state,
            "state_prefill": max(
                (work.states_read + work.states_written) * r.state, work.prefill_tokens * r.state_prefill_token
            ),
            "moves": 2 * bytes_moved / d.bandwidth,
            "overhead": d.step_overhead_s,
        }
        n = self.num_devices
        if n > 1:
            activation = tokens * p.hidden_size * self.weight_bytes
            each = d.collective_latency_s + 2 * (n - 1) / n * activation / d.link_bandwidth
            terms["collectives"] = 2 * p.num_layers * each
        return terms

    @cached_property
    def _rates(self) -> "_Rates":
        return _Rates.of(self.parameters, self.spec, self.device, self.num_devices)


@dataclass(frozen=True)
class _Rates:
    """Seconds per unit of work, on all devices together."""

    dense_byte: float
    dense_flop: float
    expert_byte: float
    expert_flop: float
    kv_token: float
    attention_pair: float
    state: float
    """Read or written once, all layers."""
    state_prefill_token: float

    @classmethod
    def of(cls, p: ModelParameters, spec: CacheSpec, d: DeviceSpec, n: int) -> "_Rates":
        kv, state = spec.attention, spec.state
        # A latent (v_dim = 0) is both K and V.
        pair = 2 * p.num_query_heads * (kv.k_dim + (kv.v_dim or kv.k_dim)) * len(spec.attention_layers) if kv else 0
        token = spec.tp_size * _delta_rule_flops(state.recurrent_shape) * len(spec.state_layers) if state else 0
        return cls(
            dense_byte=1 / (n * d.bandwidth * d.dense_efficiency),
            dense_flop=1 / (n * d.flops * d.dense_matmul_efficiency),
            expert_byte=1 / (n * d.bandwidth * d.expert_efficiency),
            expert_flop=1 / (n * d.flops * d.expert_matmul_efficiency),
            kv_token=spec.kv_bytes_per_token / (d.bandwidth * d.kv_efficiency),
            attention_pair=pair / (n * d.flops * d.prefill_attention_efficiency),
            state=spec.state_bytes / (d.bandwidth * d.state_efficiency),
            state_prefill_token=token / (n * d.flops * d.state_prefill_efficiency),
        )


def _delta_rule_flops(recurrent_shape: tuple[int, ...]) -> int:
    """FLOPs of one token in one layer of the chunked rule: three products with the state, and inside a chunk the three
    score products, the solve applied to keys and values, and the scores applied to values. Shapes without heads, key and
    value dims (Mamba-1, or no recurrence) count the products with the state only."""
    if len(recurrent_shape) != 3:
        return 6 * prod(recurrent_shape) if recurrent_shape else 0
    heads, dk, dv = recurrent_shape
    return heads * (6 * dk * dv + 2 * DELTA_RULE_CHUNK * (3 * dk + 2 * dv))
