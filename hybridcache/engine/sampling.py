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
from hybridcache.kernels.greedy import NOT_FINITE
from hybridcache.kernels.torch_ops.layers import greedy

_ROWS_AT_ONCE = 32
"""Rows whose probabilities are in memory together: 32 x 151,936 float64 are 39 MB."""
_COPIES = 12
"""Float64 copies of their logits at most: scaled, sorted with order and scratch, probabilities, and their sums."""

_SEED_LIMIT = 2**63
MOST_OUTPUTS = 1024
"""Outputs of one prompt."""
CHILD_BITS = 40
"""A request's id is its number among the engine's requests, plus which output of its prompt it is times 2 to this power."""

_PHILOX_ROUNDS = 10
_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_PHILOX_W0, _PHILOX_W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """Says how one request is sampled and where it ends.

    Args:
        max_tokens: most output tokens.
        temperature: 0 takes the most likely token; above, logits are divided by it and sampled.
        top_k: sample among the ``top_k`` most likely tokens; 0 for all.
        top_p: sample among the most likely tokens whose probability together reaches ``top_p``.
        min_p: sample among tokens at least ``min_p`` times as likely as the most likely one; 0 for all.
        seed: seeds this request's randomness. None derives a seed from the engine's and the request's id.
        stop_token_ids: output ends after any of these; the token is part of the output.
        n: outputs of the prompt. It is computed once; each output has its own randomness, which does not depend on ``n``.
        ignore_eos: do not end at the model's end-of-sequence token.
        checkpoint_at: positions at which to keep the prompt's states (:mod:`hybridcache.prefix.cache`).

    Raises: UserError where a value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    checkpoint_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise bad("max_tokens", self.max_tokens, "ask for at least one output token")
        if not isinstance(self.temperature, Real) or not 0.0 <= self.temperature < float("inf"):
            raise bad("temperature", self.temperature, "give 0 for greedy, or a positive number")
        if not _is_int(self.top_k) or self.top_k < 0:
            raise bad("top_k", self.top_k, "give a number of tokens, or 0 for all")
        if not isinstance(self.top_p, Real) or not 0.0 < self.top_p <= 1.0:
            raise bad("top_p", self.top_p, "give a probability above 0, up to 1")
        if not isinstance(self.min_p, Real) or not 0.0 <= self.min_p <= 1.0:
            raise bad("min_p", self.min_p, "give a share of the highest probability, from 0 to 1")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < _SEED_LIMIT):
            raise bad("seed", self.seed, "give a whole number from 0 to below 2**63, or None")
        if not _is_int(self.n) or not 1 <= self.n <= MOST_OUTPUTS:
            raise bad("n", self.n, f"ask for 1 to {MOST_OUTPUTS:,} outputs")
        if isinstance(self.stop_token_ids, str) or not all(_is_int(token) for token in self.stop_token_ids):
            raise bad("stop_token_ids", self.stop_token_ids, "give token ids")
        if isinstance(self.checkpoint_at, str) or not all(_is_int(p) and p > 0 for p in self.checkpoint_at):
            raise bad(
                "checkpoint_at", self.checkpoint_at, "give positions in the prompt, counted in tokens from its start"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "checkpoint_at", tuple(sorted(set(self.checkpoint_at))))

    @property
    def restricted(self) -> bool:
        """Whether the cut depends on the order of the tokens."""
        return self.top_k > 0 or self.top_p < 1.0


class SamplingRow(NamedTuple):
    """One row to sample: the request's parameters, its key, and the position of the token in the output."""

    params: SamplingParams
    key: tuple[int, int]
    position: int


GREEDY = SamplingRow(SamplingParams(), (0, 0), 0)
"""The sampling of every row with temperature 0."""


def request_key(params: SamplingParams, engine_seed: int, seq_id: int) -> tuple[int, int]:
    """The 128-bit key of a request's randomness, made of which output of its prompt it is, and of its own seed or of the
    engine's seed and the request's number."""
    child = seq_id >> CHILD_BITS << CHILD_BITS
    return (params.seed, child) if params.seed is not None else (engine_seed, 1 + seq_id)


def uniform(key: tuple[int, int], position: int) -> float:
    """A number in [0, 1) that depends on ``key`` and ``position`` alone: Philox4x64-10 (Salmon et al., SC 2011)."""
    return float(uniforms(np.array([key], dtype=np.uint64), np.array([position]))[0])


def uniforms(key_R2: np.ndarray, position_R: np.ndarray) -> np.ndarray:
    """:func:`uniform` of many rows at once, float64: the first number of NumPy's ``Philox(key=key, counter=position)``."""
    with np.errstate(over="ignore"):  # sums and products of uint64 wrap, as they should
        c0, c1, c2, c3 = position_R.astype(np.uint64) + np.uint64(1), *np.zeros((3, len(position_R)), np.uint64)
        k0, k1 = key_R2[:, 0], key_R2[:, 1]
        for _ in range(_PHILOX_ROUNDS):
            high0, low0 = _multiply(_PHILOX_M0, c0)
            high1, low1 = _multiply(_PHILOX_M1, c2)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + _PHILOX_W0, k1 + _PHILOX_W1
    return (c0 >> np.uint64(11)) * 2.0**-53


def _multiply(a: np.uint64, b_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of a product."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, b1, b0 = a >> half, a & low, b_R >> half, b_R & low
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half), a * b_R


def sampling_bytes(rows: int, vocabulary: int, itemsize: int) -> int:
    """Most bytes that :func:`draw` holds at once for that many rows, their logits included."""
    return rows * vocabulary * itemsize + min(rows, _ROWS_AT_ONCE) * vocabulary * 8 * _COPIES


def sample(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token id per row, :data:`NOT_FINITE` where the logits hold NaN."""
    ids_R = torch.empty(logits_RV.shape[0], dtype=torch.int64, device=logits_RV.device)
    greedy(logits_RV, ids_R, torch.empty_like(ids_R))
    draw(logits_RV, rows, ids_R)
    return ids_R.tolist()


def draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow | None], ids_R: torch.Tensor) -> None:
    """Replace greedy ids by sampled ones in place, for rows whose temperature is above 0. Nothing waits for the device.

    Args:
        logits_RV: logits of all rows.
        rows: sampling of each row; None leaves the row's id as it is.
        ids_R: the ids that :func:`greedy` chose; :data:`NOT_FINITE` stays.
    """
    drawn = [i for i, row in enumerate(rows) if row is not None and row.params.temperature > 0.0]
    if not drawn:
        return
    # Sorting changes the order of summation, so whether a row is sorted must not depend on the other rows.
    for restricted in (False, True):
        alike = [i for i in drawn if _params(rows, i).restricted == restricted]
        for first in range(0, len(alike), _ROWS_AT_ONCE):
            some = alike[first : first + _ROWS_AT_ONCE]
            index = _to_device(torch.tensor(some), logits_RV.device)
            found = _draw(logits_RV[index], [row for i in some if (row := rows[i]) is not None], restricted)
            ids_R[index] = found.masked_fill_(ids_R[index] == NOT_FINITE, NOT_FINITE)


def _params(rows: Sequence[SamplingRow | None], i: int) -> SamplingParams:
    row = rows[i]
    assert row is not None
    return row.params


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the tensor to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _draw(logits_RV: torch.Tensor, rows: Sequence[SamplingRow], restricted: bool) -> torch.Tensor:
    """Inverse transform sampling in float64: the token at which the cumulative probability passes the uniform number."""
    vocabulary = logits_RV.shape[-1]
    target = uniforms(np.array([row.key for row in rows], np.uint64), np.array([row.position for row in rows]))
    columns = [
        [row.params.temperature for row in rows],
        [row.params.min_p for row in rows],
        [row.params.top_k or vocabulary for row in rows],
        [row.params.top_p for row in rows],
    ]
    packed = _to_device(torch.from_numpy(np.array([target, *columns])), logits_RV.device)
    target_R1, temperature_R1, min_p_R1, top_k_R1, top_p_R1 = packed.unsqueeze(2)
    # The highest logit is subtracted so that no quotient overflows: a temperature of 1e-300 is greedy, not NaN.
    scaled = (logits_RV.double() - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R1
    if not restricted:
        return _pick(_likely_enough(torch.softmax(scaled, dim=-1), min_p_R1), target_R1)
    # A stable sort keeps the order of equal logits.
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    weights = _likely_enough(torch.softmax(scaled, dim=-1), min_p_R1)
    weights = weights * (torch.arange(vocabulary, device=weights.device) < top_k_R1)
    before = weights.cumsum(dim=-1) - weights
    weights = weights * (before < top_p_R1 * weights.sum(dim=-1, keepdim=True))
    return order.gather(-1, _pick(weights, target_R1)[:, None])[:, 0]


def _likely_enough(weights_RV: torch.Tensor, min_p_R1: torch.Tensor) -> torch.Tensor:
    return weights_RV * (weights_RV >= min_p_R1 * weights_RV.amax(dim=-1, keepdim=True))


def _pick(weights_RV: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds its share, so that a weight of 0 is never drawn."""
    cumulative = weights_RV.cumsum(dim=-1)
    found = torch.searchsorted(cumulative, uniform_R1 * cumulative[:, -1:], right=True)
    return found.clamp_(max=weights_RV.shape[-1] - 1)[:, 0]
