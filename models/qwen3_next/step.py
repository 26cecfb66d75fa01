"""Step: what the layers of one forward pass share besides the hidden states."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hybridcache.kernels.backend import Backend
from hybridcache.kernels.batch import StepBatch
from hybridcache.memory.layout import Layout
from models.qwen3_next.ops import Ops, ops_for


class Rows(NamedTuple):
    """Requests that decode, or those that prefill: cut out once a step, for every layer to read."""

    kv_table_BN: torch.Tensor
    state_table_BL: torch.Tensor
    context_len_B: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch, rows: slice) -> "Rows":
        return cls(batch.kv_table_BN[rows], batch.state_table_BL[rows], batch.context_len_B[rows])


@dataclass(frozen=True)
class Step:
    """One forward pass: the batch, the pool and the backend that reaches it, and values computed once for all layers.

    T tokens, rotary pairs as in ``layers``.
    """

    batch: StepBatch
    buffer: torch.Tensor
    layout: Layout
    backend: Backend
    cos_TP: torch.Tensor
    sin_TP: torch.Tensor
    ops: Ops
    decoding: Rows
    prefilling: Rows

    @classmethod
    def of(
        cls,
        batch: StepBatch,
        buffer: torch.Tensor,
        layout: Layout,
        backend: Backend,
        rotary: tuple[torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
        experts: str,
    ) -> "Step":
        parts = (Rows.of(batch, slice(batch.num_decode)), Rows.of(batch, slice(batch.num_decode, None)))
        return cls(batch, buffer, layout, backend, *rotary, ops_for(backend, dtype, experts), *parts)

    @property
    def has_prefill(self) -> bool:
        return self.batch.num_tokens > self.batch.num_decode
