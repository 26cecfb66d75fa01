"""Sampling: from logits to token ids, reproducible whatever else is in the batch.

The randomness of one output token is one uniform number that depends on the request's key and the token's position
in the output alone. So a request gives the same tokens in any batch, under any strategy, and after a preemption.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch

from hybridcache.errors import bad

NOT_FINITE = -1
"""Returned in place of a token id where a row's logits hold NaN or no finite maximum."""

_ROWS_AT_ONCE = 32
"""Rows whose probabilities are in memory together: 32 x 151,936 float64 are 39 MB."""

_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled, and where it ends.

    Args:
        max_tokens: most output tokens.
        temperature: 0 takes the most likely token; above, logits are divided by it and sampled.
        top_k: sample among the ``top_k`` most likely tokens; 0 for all.
        top_p: sample among the most likely tokens whose probability together reaches ``top_p``.
        seed: of this request's randomness. None derives one from the engine's seed and the request's id.
        stop_token_ids: output ends after any of these; the token is part of the output.
        ignore_eos: do not end at the model's end-of-sequence token.

    Raises:
        UserError: a value out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise bad("max_tokens", self.max_tokens, "ask for at least one output token")
        if not isinstance(self.temperature, Real) or not 0.0 <= self.temperature < float("inf"):
            raise bad("temperature", self.temperature, "give 0 for greedy, or a positive number")
        if not _is_int(self.top_k) or self.top_k < 0:
            raise bad("top_k", self.top_k, "give a number of tokens, or 0 for all")
        if not isinstance(self.top_p, Real) or not 0.0 < self.top_p <= 1.0:
            raise bad("top_p", self.top_p, "give a probability above 0, up to 1")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < _SEED_LIMIT):
            raise bad("seed", self.seed, "give a whole number from 0 to below 2**63, or None")
        if isinstance(self.stop_token_ids, str) or not all(_is_int(token) for token in self.stop_token_ids):
            raise bad("stop_token_ids", self.stop_token_ids, "give token ids")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def restricted(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1.0


class SamplingRow(NamedTuple):
    """One row to sample: the request's parameters, its key, and the position of the token in the output."""

    params: SamplingParams
    key: tuple[int, int]
    position: int


def request_key(params: SamplingParams, engine_seed: int, seq_id: int) -> tuple[int, int]:
    """The 128-bit key of a request's randomness: of its own seed, or of the engine's seed and the request's id."""
    return (params.seed, 0) if params.seed is not None else (engine_seed, 1 + seq_id)


def uniform(key: tuple[int, int], position: int) -> float:
    """A number in [0, 1) that depends on ``key`` and ``position`` alone: Philox4x64-10 (Salmon et al., SC 2011)."""
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=position)
    return float(np.random.Generator(bits).random())


def sample(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token id per row, :data:`NOT_FINITE` where the logits hold NaN. One transfer from the device."""
    best = logits_RV.max(dim=-1)
    ids = best.indices
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0.0]
    # Rows that are sorted and rows that are not sum in different orders: which a row is must not depend on the others.
    for restricted in (False, True) if drawn else ():
        alike = [i for i in drawn if rows[i].params.restricted == restricted]
        for first in range(0, len(alike), _ROWS_AT_ONCE):
            some = alike[first : first + _ROWS_AT_ONCE]
            index = torch.tensor(some, device=logits_RV.device)
            ids[index] = _draw(logits_RV[index], [rows[i] for i in some], restricted)
    return torch.where(torch.isfinite(best.values), ids, NOT_FINITE).tolist()


def _draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow], restricted: bool) -> torch.Tensor:
    """Inverse transform sampling in float64: the token at which the cumulative probability passes the uniform number."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    vocabulary = logits_RV.shape[-1]
    scaled = logits_RV.double() / column([row.params.temperature for row in rows])
    target = column([uniform(row.key, row.position) for row in rows])
    if not restricted:
        return _pick(torch.softmax(scaled, dim=-1), target)
    # Stable, so that equal logits keep their order.
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    weights = torch.softmax(scaled, dim=-1)
    rank = torch.arange(vocabulary, device=weights.device)
    weights = weights * (rank < column([row.params.top_k or vocabulary for row in rows]))
    before = weights.cumsum(dim=-1) - weights
    weights = weights * (before < column([row.params.top_p for row in rows]) * weights.sum(dim=-1, keepdim=True))
    return order.gather(-1, _pick(weights, target)[:, None])[:, 0]


def _pick(weights_RV: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds its share, so that a weight of 0 is never drawn."""
    cumulative = weights_RV.cumsum(dim=-1)
    found = torch.searchsorted(cumulative, uniform_R1 * cumulative[:, -1:], right=True)
    return found.clamp_(max=weights_RV.shape[-1] - 1)[:, 0]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
