"""Fitting a stream to real inference: scale its lengths down, give it real prompts."""

import random
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from importlib.resources import files

import numpy as np

from hybridcache.errors import bad, whole
from hybridcache.workloads.base import Request, Workload
from hybridcache.workloads.byte_tokenizer import Tokenizer

ARRIVALS = ("at_once", "scaled")


def cut_to_size(
    workload: Workload, *, max_prompt: int, max_output: int, num_requests: int | None = None, arrivals: str = "at_once",
    keep_ratio: bool = True,
) -> Workload:  # fmt: skip
    """The same stream in small: its first ``num_requests`` requests with every length multiplied by one factor.

    The factor is the largest, at most 1, with which the longest prompt has at most ``max_prompt`` tokens and the longest
    output at most ``max_output``. Lengths are rounded down, to at least 1. One factor for both keeps the ratio of prompt
    to output and the spread of lengths, but where prompts are much longer than outputs most outputs end at 1 token;
    ``keep_ratio=False`` scales prompts and outputs each by their own factor. Of prompts with ids every ``1 / factor``-th id
    is kept, so that two prompts share the same fraction of their tokens as before.

    Args:
        workload: the stream.
        max_prompt, max_output: tokens.
        num_requests: None for all.
        arrivals: ``at_once``, or ``scaled``: times multiplied by the prompts' factor, which keeps prompt tokens per second.
        keep_ratio: one factor for prompts and outputs.

    Raises:
        UserError: a value out of range.
    """
    if arrivals not in ARRIVALS:
        raise bad("arrivals", arrivals, f"choose one of {', '.join(ARRIVALS)}")
    if num_requests is not None:
        num_requests = whole("num_requests", num_requests)
    workload = workload.first(num_requests)
    requests = workload.requests
    prompt_factor = _factor("max_prompt", max_prompt, (request.prompt_tokens for request in requests))
    output_factor = _factor("max_output", max_output, (request.output_tokens for request in requests))
    if keep_ratio:
        prompt_factor = output_factor = min(prompt_factor, output_factor)
    with_time = arrivals == "scaled"
    cut = tuple(_scaled(request, prompt_factor, output_factor, with_time) for request in requests)
    how = f"prompts x {float(prompt_factor):.4g}, outputs x {float(output_factor):.4g}, arrivals {arrivals}"
    return Workload(workload.name, f"{workload.source} ({how})", cut)


def _factor(field: str, longest: int, lengths: Iterable[int]) -> Fraction:
    """Exact, so that the longest length becomes ``longest`` and never one less."""
    return min(Fraction(1), Fraction(whole(field, longest), max(lengths)))


def _scaled(request: Request, prompt_factor: Fraction, output_factor: Fraction, with_time: bool) -> Request:
    prompt = max(int(request.prompt_tokens * prompt_factor), 1)
    ids = request.prompt_ids
    if ids is not None:
        known = np.asarray(ids).tolist()
        ids = tuple(known[i * prompt_factor.denominator // prompt_factor.numerator] for i in range(prompt))
    return replace(
        request,
        arrival_s=request.arrival_s * float(prompt_factor) if with_time else 0.0,
        prompt_tokens=prompt,
        output_tokens=max(int(request.output_tokens * output_factor), 1),
        prompt_ids=ids,
        output_ids=None,
        service_s=None,
    )


def license_text() -> str:
    """The text of the Apache License 2.0: English prose that may be shipped."""
    return files("hybridcache.workloads").joinpath("data/apache-2.0.txt").read_text(encoding="utf-8")


def with_text_prompts(workload: Workload, tokenizer: Tokenizer, seed: int = 0) -> Workload:
    """The same stream with token ids for every prompt, exactly as many as its length says.

    A prompt without ids becomes a slice of the Apache License 2.0, tokenized, from an offset that depends on ``seed`` and
    the request's id only (the text starts again where it ends). A prompt with ids (a trace with prefix sharing) keeps
    them, folded into the tokenizer's vocabulary by the remainder.

    Args:
        workload: the stream.
        tokenizer: has ``encode(text) -> ids`` and ``vocab_size``.
        seed: of the offsets.

    Raises:
        UserError: a tokenizer that gives no token.
    """
    text = tokenizer.encode(license_text())
    if not text:
        raise bad("tokenizer", type(tokenizer).__name__, "encodes the license text to no token; give another")
    requests = tuple(
        replace(request, prompt_ids=_prompt(request, text, tokenizer.vocab_size, seed)) for request in workload.requests
    )
    return Workload(workload.name, workload.source, requests)


def _prompt(request: Request, text: list[int], vocab_size: int, seed: int) -> tuple[int, ...]:
    if request.prompt_ids is not None:
        return tuple((np.asarray(request.prompt_ids) % vocab_size).tolist())
    offset = random.Random(f"{seed}-{request.request_id}").randrange(len(text))
    repeats = -(-(offset + request.prompt_tokens) // len(text))
    return tuple((text * repeats)[offset : offset + request.prompt_tokens])
