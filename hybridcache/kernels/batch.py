"""StepBatch: one engine step as the tensors that the model and its kernels read.

Shapes: T tokens of the step, B requests (table rows), P of them prefilling, N table entries (or checkpoints of a
row), L state layers, R rows whose logits are wanted.

Requests are ordered decode first: rows ``0 .. num_decode - 1`` have exactly one token each, which are tokens
``0 .. num_decode - 1``; the prefilling rows follow, their tokens contiguous in row order.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepBatch:
    """All tensors on the model's device."""

    token_ids_T: Tensor
    """int64."""
    position_T: Tensor
    """int64; position of each token in its request."""
    row_T: Tensor
    """int32; table row of each token."""
    kv_table_BN: Tensor
    """int32; -1 beyond a request's last entry."""
    state_read_BL: Tensor
    """int32; block of each state before this step. -1 in padding rows; not read at position 0."""
    state_write_BL: Tensor
    """int32; block that takes it. Equal entries are an update in place, and both tables may be one tensor."""
    context_len_B: Tensor
    """int32; tokens of each request after this step (the new ones included)."""
    prefill_cu_seqlens: Tensor
    """int32 ``[P + 1]``; offsets of the prefilling rows' tokens, counted from token ``num_decode``."""
    prefill_start_P: Tensor
    """int32; position of each prefilling row's first token of this step."""
    logit_index_R: Tensor | None
    """int64; indices into T. None for every token."""
    num_decode: int
    max_prefill_len: int
    """Longest prefilling row of this step, in tokens (0 where none prefills)."""
    max_context_len: int
    """Longest ``context_len_B``."""
    checkpoint_table_PNL: Tensor | None = None
    """int32; block that keeps the state of a prefilling row at ``(start // interval + 1 + n) * interval``, -1 for none."""
    checkpoint_interval: int = 0
    """Tokens, a multiple of 64; 0 where the step keeps no checkpoint."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    @property
    def num_rows(self) -> int:
        return self.context_len_B.shape[0]
