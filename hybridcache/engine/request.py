"""Request: a sequence of the engine that also keeps its tokens and sampling parameters."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.engine.sampling import CHILD_BITS, GREEDY, SamplingParams, SamplingRow, request_key
from hybridcache.engine.sequence import Sequence, Status
from hybridcache.errors import bad

NO_TOKENS = np.empty(0, dtype=np.int64)


@dataclass(eq=False, slots=True)
class Request(Sequence):
    """A sequence with tokens, sampling and failures. Build it with :meth:`of`."""

    params: SamplingParams = field(default_factory=SamplingParams)
    key: tuple[int, int] = (0, 0)
    stop_ids: frozenset[int] = frozenset()
    error: str | None = None
    """Reason why the request ended with ``error``."""
    failures_together: int = 0
    failures_alone: int = 0
    alone_until: float = 0
    """The request is computed alone below this position: a step of several requests failed there."""
    _tokens: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """int64; the prompt, then sampled tokens, filled in as :meth:`tokens` needs them."""

    @classmethod
    def of(
        cls,
        seq_id: int,
        prompt: npt.ArrayLike,
        params: SamplingParams,
        *,
        seed: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        arrival_s: float = 0.0,
    ) -> "Request":
        """Make a request; the engine's ``seed`` counts where ``params`` has none."""
        ids = np.asarray(prompt, dtype=np.int64)
        tokens = np.empty(len(ids) + params.max_tokens, dtype=np.int64)
        tokens[: len(ids)] = ids
        return cls(
            seq_id=seq_id,
            prompt_len=len(ids),
            max_tokens=params.max_tokens,
            arrival_s=arrival_s,
            params=params,
            key=request_key(params, seed, seq_id),
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids),
            _tokens=tokens,
        )

    @classmethod
    def outputs_of(
        cls, number: int, prompt: npt.ArrayLike, params: SamplingParams, **options: Any
    ) -> "tuple[Request, ...]":
        """The requests for the ``params.n`` outputs of the engine's ``number``-th prompt; ``options`` as for :meth:`of`."""
        found = tuple(cls.of(number + (child << CHILD_BITS), prompt, params, **options) for child in range(params.n))
        for request in found if len(found) > 1 else ():
            request.siblings = found
        return found

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens ``start .. end - 1`` (int64) of the prompt followed by the sampled ids that have arrived."""
        first, last = max(start, self.prompt_len), min(end, self.prompt_len + len(self.output_ids))
        if last > first:
            self._tokens[first:last] = self.output_ids[first - self.prompt_len : last - self.prompt_len]
        return self._tokens[start:end]

    def end_if_complete(self, now_s: float) -> None:
        """After an interrupt: count the tokens that have arrived, and end the request where the last one ends it."""
        self.num_settled = self.num_output = len(self.output_ids)
        if self.status is Status.FINISHED or not self.output_ids:
            return
        stopped = self.output_ids[-1] in self.stop_ids
        if stopped or self.num_settled >= self.max_tokens:
            self.status, self.finish_s, self.finish_reason = Status.FINISHED, now_s, "stop" if stopped else "length"

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompt (int64)."""
        return self._tokens[: self.prompt_len]

    def sampling(self) -> SamplingRow:
        """Parameters, key and position of the next output token."""
        if self.params.temperature == 0.0:
            return GREEDY
        return SamplingRow(self.params, self.key, self.num_output)


def checked_prompt(prompt_ids: npt.ArrayLike, vocabulary: int) -> np.ndarray:
    """The prompt as an array of whole numbers.

    Raises:
        UserError: the prompt is empty, is no flat list of whole numbers, or has a token outside the vocabulary.
    """
    try:
        prompt = np.asarray(prompt_ids)
    except ValueError:  # numpy raises it for a ragged list
        raise bad("prompt_ids", prompt_ids, "give token ids as a flat list") from None
    if prompt.ndim != 1 or prompt.size == 0:
        raise bad("prompt_ids", prompt_ids, "give at least one token id, as a flat list")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise bad("prompt_ids", f"{prompt.dtype} values", "give whole numbers")
    outside = np.flatnonzero((prompt < 0) | (prompt >= vocabulary))
    if outside.size:
        first = int(outside[0])
        raise bad(
            f"prompt_ids[{first}]",
            int(prompt[first]),
            f"outside the model's vocabulary of {vocabulary} ids (0 to {vocabulary - 1})",
        )
    return prompt
