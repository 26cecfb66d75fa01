"""Step: what the layers of one forward pass share besides the hidden states."""

from dataclasses import dataclass

import torch

from hybridcache.batch import StepBatch
from hybridcache.kernels.backend import Backend
from hybridcache.layout import Layout
from models.qwen3_next.ops import Ops, ops_for


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
        return cls(batch, buffer, layout, backend, rotary[0], rotary[1], ops_for(backend, dtype, experts))

    @property
    def has_prefill(self) -> bool:
        return self.batch.num_tokens > self.batch.num_decode
