"""Request: what the engine keeps of a request beyond its progress."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridcache.engine.sampling import GREEDY, SamplingParams, SamplingRow, request_key
from hybridcache.engine.sequence import Sequence
from hybridcache.errors import bad


@dataclass(eq=False, slots=True)
class Request:
    """A sequence with its tokens, how it is sampled, and how it has failed."""

    seq: Sequence
    params: SamplingParams
    key: tuple[int, int]
    stop_ids: frozenset[int]
    _tokens: np.ndarray
    """int64; prompt, then those sampled tokens that were asked for."""
    error: str | None = None
    failures_together: int = 0
    failures_alone: int = 0
    alone_until: float = 0
    """Positions below this are computed in a batch of its own: a step of several requests failed there."""

    @classmethod
    def of(
        cls, seq: Sequence, prompt: np.ndarray, params: SamplingParams, seed: int, eos_token_ids: frozenset[int]
    ) -> "Request":
        """A new request; ``seed`` is the engine's, for one that has none of its own."""
        tokens = np.empty(len(prompt) + params.max_tokens, dtype=np.int64)
        tokens[: len(prompt)] = prompt
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        return cls(seq, params, request_key(params, seed, seq.seq_id), stop_ids, tokens)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """int64; tokens ``start .. end - 1`` of the prompt and the sampled ids that have arrived."""
        seq = self.seq
        first, last = max(start, seq.prompt_len), min(end, seq.prompt_len + len(seq.output_ids))
        if last > first:
            self._tokens[first:last] = seq.output_ids[first - seq.prompt_len : last - seq.prompt_len]
        return self._tokens[start:end]

    def sampling(self) -> SamplingRow:
        """How its next output token is sampled."""
        if self.params.temperature == 0.0:
            return GREEDY
        return SamplingRow(self.params, self.key, self.seq.num_output)


def checked_prompt(prompt_ids: npt.ArrayLike, vocabulary: int) -> np.ndarray:
    """A prompt as an array of whole numbers.

    Raises:
        UserError: it is empty, no flat list of whole numbers, or has a token outside the vocabulary.
    """
    try:
        prompt = np.asarray(prompt_ids)
    except ValueError:  # numpy's word for a ragged list
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
