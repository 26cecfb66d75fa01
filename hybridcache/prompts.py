"""What a user may give to be generated from: prompts as texts, token ids or vLLM's dicts, and sampling parameters."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridcache.engine.sampling import SamplingParams
from hybridcache.errors import UserError, bad
from hybridcache.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray | torch.Tensor | Mapping[str, Any]
"""A text; its token ids, as a list, a NumPy array or a PyTorch tensor of one dimension; or one of vLLM's dicts,
``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    text: str | None
    """None where the prompt was given as token ids."""
    token_ids: list[int]


_FIX = "give a text, or token ids as a list, an array or a tensor of whole numbers"


def read_prompts(prompts: Any) -> list[str | list[int]]:
    """Every prompt as a text or a list of token ids; a single one may stand alone.

    Args:
        prompts: one :data:`Prompt` or an iterable of them. An array or a tensor of two dimensions is one prompt a row.

    Raises:
        UserError: anything else; the message names the prompt.
    """
    given = _plain(prompts)
    if isinstance(given, str | Mapping):
        return [_read("prompts[0]", given)]
    if isinstance(given, bytes | bytearray) or not isinstance(given, Iterable):
        raise bad("prompts", given, _FIX)
    items = [_plain(item) for item in given]
    if not items:
        raise bad("prompts", prompts, "give at least one prompt")
    if all(_is_id(item) for item in items):
        return [[int(item) for item in items]]
    return [_read(f"prompts[{i}]", item) for i, item in enumerate(items)]


def read_params(given: Any, count: int) -> list[SamplingParams]:
    """The sampling parameters of each of ``count`` prompts.

    Args:
        given: one :class:`SamplingParams` for all prompts, or one for each; None for the defaults.

    Raises:
        UserError: anything else; where it is a dict, the message spells the parameters out.
    """
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise bad("sampling_params", given, _params_fix(given))
    params = list(given)
    if len(params) != count:
        raise bad("sampling_params", f"{len(params)} entries", f"give one, or one for each of the {count} prompts")
    for i, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise bad(f"sampling_params[{i}]", one, _params_fix(one))
    return params


def encode(field: str, prompt: str | list[int], tokenizer: Tokenizer | None) -> EncodedPrompt:
    """The prompt with its token ids, at least one.

    Raises:
        UserError: a text where the model has no tokenizer, or an empty prompt.
    """
    if not isinstance(prompt, str):
        encoded = EncodedPrompt(None, prompt)
    elif tokenizer is None:
        raise bad(field, prompt[:40], "the model has no tokenizer; give token ids")
    else:
        encoded = EncodedPrompt(prompt, list(tokenizer.encode(prompt)))
    if not encoded.token_ids:
        raise bad(field, prompt, "is empty; give at least one token")
    return encoded


def _read(field: str, prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        unknown = [key for key in prompt if key not in ("prompt", "prompt_token_ids")]
        if unknown or not prompt:
            raise bad(
                field, sorted(map(str, prompt)), "of a dict's keys only prompt and prompt_token_ids are understood"
            )
        if "prompt_token_ids" not in prompt:
            text = _plain(prompt["prompt"])
            if not isinstance(text, str):
                raise _refused(f"{field}['prompt']", text, "give a text")
            return text
        field, prompt = f"{field}['prompt_token_ids']", _plain(prompt["prompt_token_ids"])
        if isinstance(prompt, str):
            raise _refused(field, prompt, "give token ids")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise _refused(field, prompt, _FIX)
    tokens = [_plain(token) for token in prompt]
    for i, token in enumerate(tokens):
        if not _is_id(token):
            raise _refused(f"{field}[{i}]", token, "is no token id; give whole numbers")
    return [int(token) for token in tokens]


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers of Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _refused(field: str, value: Any, fix: str) -> UserError:
    """As :func:`~hybridcache.errors.bad`, with a value of any length cut short."""
    return UserError(f"{field}={' '.join(shortened(value).split())}: {fix}")


def _params_fix(given: Any) -> str:
    known = SamplingParams.__dataclass_fields__
    if isinstance(given, Mapping) and all(key in known for key in given):
        return f"give SamplingParams({', '.join(f'{key}={value!r}' for key, value in given.items())})"
    return f"give a SamplingParams, whose fields are {', '.join(known)}"
