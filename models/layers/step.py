"""Step: what the layers of one forward pass share besides the hidden states."""

from typing import NamedTuple

from torch import Tensor

from hybridcache.kernels.backend import Backend, Caches
from hybridcache.kernels.batch import StepBatch


class Rows(NamedTuple):
    """Requests that decode, or those that prefill: cut out once a step, for every layer to read."""

    kv_table_BN: Tensor
    state_read_BL: Tensor
    state_write_BL: Tensor
    context_len_B: Tensor


class Step:
    """One forward pass: the batch, the pool's caches, and values computed once for all layers.

    Args:
        rotary: cosines and sines of the tokens' positions, as :class:`~models.layers.rotary.Rotary` gives them.
    """

    def __init__(self, batch: StepBatch, caches: Caches, rotary: tuple[Tensor, Tensor]) -> None:
        self.batch = batch
        self.caches = caches
        self.backend: Backend = caches.backend
        self.cos_TP, self.sin_TP = rotary
        n = batch.num_decode
        self.has_prefill = batch.token_ids_T.shape[0] > n
        # Tables that are one tensor stay one: an update in place is seen as such.
        in_place = batch.state_read_BL is batch.state_write_BL
        parts = []
        for rows in (slice(n), slice(n, None)):
            written_BL = batch.state_write_BL[rows]
            read_BL = written_BL if in_place else batch.state_read_BL[rows]
            parts.append(Rows(batch.kv_table_BN[rows], read_BL, written_BL, batch.context_len_B[rows]))
        self.decoding, self.prefilling = parts
