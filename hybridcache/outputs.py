"""Request outputs and token streams."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from hybridcache.workloads.byte_tokenizer import Tokenizer

INCOMPLETE = "\ufffd"
"""A tokenizer decodes the first bytes of a character to this while the character's other bytes have not come."""


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a prompt, and how it ran. Times are seconds since the LLM's first request."""

    index: int
    """Which of the prompt's ``n`` outputs it is, from 0."""
    token_ids: list[int]
    text: str | None
    """None where the model has no tokenizer."""
    finish_reason: str
    """``length``, ``stop``, ``error`` or, in a stream, ``abort``."""
    error: str | None
    first_token_s: float | None
    finish_s: float
    ttft_s: float | None
    """Arrival to first token, queueing included."""
    tpot_s: float | None
    """Mean time per output token after the first; None for a single one."""
    preemptions: int
    recomputed_tokens: int
    """Tokens that a preemption dropped."""
    hit_tokens: int
    """Tokens that it did not compute, because it began with a checkpoint of them."""
    refound_tokens: int
    """Tokens that it did not compute, because it (before a preemption) or another output of the prompt had."""


@dataclass(frozen=True)
class RequestOutput:
    """The outputs of one finished prompt. What an output has, ``text`` say, a prompt has too: it is that of its first."""

    prompt: str | None
    """None where the prompt was given as token ids."""
    prompt_token_ids: list[int]
    arrival_s: float
    outputs: list[CompletionOutput]
    """One for each of ``SamplingParams.n``, in order."""

    def __getattr__(self, name: str) -> Any:
        if name in CompletionOutput.__dataclass_fields__ and name != "index":
            return getattr(self.outputs[0], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True)
class StreamOutput:
    """One token of a stream, or a request's end."""

    index: int
    """Index of the prompt among the stream's prompts."""
    output_index: int
    """Which of the prompt's outputs the token belongs to."""
    token_id: int | None
    """None where the output ended without another token (``abort``, ``error``)."""
    text: str | None
    """The piece that the token adds to the text. It is empty while the token is part of a character, and None where the
    model has no tokenizer."""
    output: RequestOutput | None
    """All outputs of the prompt, given once, with the last token or the end of the last to end."""


class StreamedToken(NamedTuple):
    """One entry of a stream's inbox."""

    prompt_index: int
    """Index of the prompt among the stream's prompts."""
    output_index: int
    """Which of its outputs."""
    token_id: int | None
    """None where the output ended without another token."""
    ended: bool
    """Whether the output has ended."""


class TextPieces:
    """Turns tokens into pieces of text that together are the text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        """The next piece is decoded from this token on, one piece early: words are joined differently at a text's start."""
        self._told = 0
        """Number of tokens whose text has been given."""

    def add(self, token_id: int | None, *, last: bool) -> str | None:
        """The text that a token adds. An unfinished character is held back until its last token, or the text's, comes."""
        if self._tokenizer is None:
            return None
        if token_id is not None:
            self._ids.append(token_id)
        told = self._tokenizer.decode(self._ids[self._begin : self._told], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids[self._begin :], skip_special_tokens=True)
        if text.endswith(INCOMPLETE) and not last:
            return ""
        self._begin, self._told = self._told, len(self._ids)
        return text[len(told) :]


class TokenStream(Iterator[StreamOutput]):
    """Iterates over tokens in the order in which steps give them. Several streams, and ``LLM.generate``, may run side by
    side: each call advances all of them, and each stream gets its own tokens.

    A stream's requests end, and their memory is freed, when it is closed or dropped, when its ``with`` block ends, and
    when :meth:`__next__` raises.
    """

    def __init__(
        self,
        num_outputs: Sequence[int],
        inbox: deque[StreamedToken],
        advance: Callable[[], object],
        abort: Callable[[int], object],
        output: Callable[[int], RequestOutput],
        drop: Callable[[], object],
        tokenizer: Tokenizer | None,
    ) -> None:
        """
        Args:
            num_outputs: of each prompt; the prompts are numbered from 0.
            inbox: ``advance`` appends the stream's tokens to it.
            advance: runs one step of the engine.
            abort: ends all outputs of the prompt of that index.
            output: gives the outputs of the ended prompt of that index.
            drop: ends all requests and forgets them; may be called again.
            tokenizer: None where tokens have no text.
        """
        self._inbox = inbox
        self._advance, self._abort, self._output, self._drop = advance, abort, output, drop
        self._texts = [[TextPieces(tokenizer) for _ in range(count)] for count in num_outputs]
        self._open = {index: set(range(count)) for index, count in enumerate(num_outputs)}
        """Outputs whose end has not been told, by prompt."""

    def __next__(self) -> StreamOutput:
        if not self._open:
            self.close()
            raise StopIteration
        try:
            while not self._inbox:
                self._advance()
            index, child, token, ended = self._inbox.popleft()
            text = self._texts[index][child].add(token, last=ended)
            last = ended and len(self._open[index]) == 1
            output = self._output(index) if last else None
        except BaseException:
            self.close()
            raise
        if ended:
            self._open[index].discard(child)
            if last:
                del self._open[index]
            if not self._open:
                self.close()
        return StreamOutput(index, child, token, text, output)

    def abort(self, index: int) -> None:
        """End all outputs of one prompt; they hold the tokens that they have so far. Those that have ended stay as they are."""
        told = {token.output_index for token in self._inbox if token.prompt_index == index and token.ended}
        left = self._open.get(index, set()) - told
        if left:
            self._abort(index)
            self._inbox.extend(StreamedToken(index, child, None, True) for child in sorted(left))

    def close(self) -> None:
        """End all requests that have not ended."""
        self._open.clear()
        self._inbox.clear()
        self._drop()

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the block ends, so that it cannot interrupt bookkeeping. A second Ctrl-C is not delayed. The
    block changes nothing outside the main thread, nor where the program has a handler of its own."""
    held = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not held:
        yield
        return
    received: list[int] = []

    def hold(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if received:
        raise KeyboardInterrupt
