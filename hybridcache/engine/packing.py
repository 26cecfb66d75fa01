"""Packing: a step's rows as the arrays that its kernels read."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybridcache.engine.graphs import Shape
from hybridcache.engine.inputs import StepFields
from hybridcache.engine.sampling import SamplingRow


class RowInput(NamedTuple):
    """Tokens of one resident request, to be computed in this step."""

    seq_id: int
    start: int
    """Position of the first."""
    num_tokens: int
    token_ids: np.ndarray | None
    """int64; None for one token that the step launched last samples for this request."""
    sampling: SamplingRow | None
    """How to sample the token after the last one; None where a prompt goes on in a later step."""


def shape_of(rows: Sequence[RowInput]) -> Shape:
    """What a step holds, without padding; rows that decode come first."""
    decode = sum(row.num_tokens == 1 and row.start > 0 for row in rows)
    return Shape(decode, sum(row.num_tokens for row in rows[decode:]), len(rows) - decode)


def fill(
    fields: StepFields,
    rows: Sequence[RowInput],
    places: Sequence[int],
    shape: Shape,
    sampled: Mapping[int, int],
    feed_rows: int,
) -> None:
    """Write a step's rows into host arrays.

    Args:
        fields: of padding, for a step of ``shape``.
        rows: those that decode, then those that prefill, whose tokens follow one another.
        places: the table row of each; prefilling rows follow at ``shape.decode``.
        shape: as large as the step, or larger; where there are more tokens in prefilling rows, there is one more such row.
        sampled: where in ``feed`` the tokens are that the last step sampled, by request.
        feed_rows: places in ``feed`` before the tokens that come with the step.
    """
    decode = shape.decode
    n = sum(place < decode for place in places)
    at, decoding = list(places[:n]), rows[:n]
    starts = [row.start for row in decoding]
    fields.position[at] = starts
    fields.context[at] = starts
    fields.context[at] += 1
    fields.index[at] = [
        sampled[row.seq_id] if row.token_ids is None else feed_rows + place for row, place in zip(decoding, at)
    ]
    for row, place in zip(decoding, at):
        if row.token_ids is not None:
            fields.token[place] = row.token_ids[0]
    last = decode
    ends = [0] * (shape.prefill + 1)
    for row, place in zip(rows[n:], places[n:]):
        number, first = place - decode, last
        last = first + row.num_tokens
        if row.token_ids is None:
            fields.index[first] = sampled[row.seq_id]
        else:
            fields.token[first:last] = row.token_ids
        fields.position[first:last] = np.arange(row.start, row.start + row.num_tokens)
        fields.row[first:last] = place
        fields.context[place] = row.start + row.num_tokens
        fields.start[number] = row.start
        fields.logit[place] = last - 1
        ends[number + 1] = last - decode
    fields.cu_seqlens[:] = np.maximum.accumulate(ends)


def fill_again(fields: StepFields, positions: np.ndarray) -> None:
    """As :func:`fill`, of rows ``0 .. n - 1`` that decode at these positions (int64) what the last step sampled, each in the
    same row."""
    n = len(positions)
    fields.index[:n] = np.arange(n)
    fields.position[:n] = positions
    fields.context[:n] = positions
    fields.context[:n] += 1


def keep_sampling(fields: StepFields, rows: Sequence[RowInput], places: Sequence[int]) -> tuple[int, list[int]]:
    """Move the logits' indices of rows that sample to the front.

    Returns:
        How many there are, and where among them the id of each row will be (of no meaning where it samples none).
    """
    samples = np.zeros(len(rows), dtype=bool)
    samples[places] = [row.sampling is not None for row in rows]
    wanted = fields.logit[: len(rows)][samples]
    fields.logit[: len(wanted)] = wanted
    return len(wanted), (np.cumsum(samples) - 1)[places].tolist()
