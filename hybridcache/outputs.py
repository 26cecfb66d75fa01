"""Request outputs and token streams."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from hybridcache.workloads.byte_tokenizer import Tokenizer

INCOMPLETE = "\ufffd"
"""A tokenizer decodes the first bytes of a character to this while the character's other bytes have not come."""


@dataclass(frozen=True)
class RequestOutput:
    """The tokens of one finished prompt, and how it ran. Times are seconds since the LLM's first request."""

    prompt: str | None
    """None where the prompt was given as token ids."""
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    """None where the model has no tokenizer."""
    finish_reason: str
    """``length``, ``stop``, ``error`` or, in a stream, ``abort``."""
    error: str | None
    arrival_s: float
    first_token_s: float | None
    finish_s: float
    ttft_s: float | None
    """Arrival to first token, queueing included."""
    tpot_s: float | None
    """Mean time per output token after the first; None for a single one."""
    preemptions: int
    recomputed_tokens: int


@dataclass(frozen=True)
class StreamOutput:
    """One token of a stream, or a request's end."""

    index: int
    """Index of the prompt among the stream's prompts."""
    token_id: int | None
    """None where the request ended without another token (``abort``, ``error``)."""
    text: str | None
    """The piece that the token adds to the text. It is empty while the token is part of a character, and None where the
    model has no tokenizer."""
    output: RequestOutput | None
    """The request's whole output, given once, with its last token or its end."""


class StreamedToken(NamedTuple):
    """One entry of a stream's inbox."""

    prompt_index: int
    """Index of the prompt among the stream's prompts."""
    token_id: int | None
    """None where the request ended without another token."""
    ended: bool
    """Whether the request has ended."""


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
        num_prompts: int,
        inbox: deque[StreamedToken],
        advance: Callable[[], object],
        abort: Callable[[int], object],
        output: Callable[[int], RequestOutput],
        drop: Callable[[], object],
        tokenizer: Tokenizer | None,
    ) -> None:
        """
        Args:
            num_prompts: the prompts are numbered from 0.
            inbox: ``advance`` appends the stream's tokens to it.
            advance: runs one step of the engine.
            abort: ends the request of the prompt of that index.
            output: gives the output of the ended prompt of that index.
            drop: ends all requests and forgets them; may be called again.
            tokenizer: None where tokens have no text.
        """
        self._inbox = inbox
        self._advance, self._abort, self._output, self._drop = advance, abort, output, drop
        self._texts = [TextPieces(tokenizer) for _ in range(num_prompts)]
        self._open = set(range(num_prompts))

    def __next__(self) -> StreamOutput:
        if not self._open:
            self.close()
            raise StopIteration
        try:
            while not self._inbox:
                self._advance()
            index, token, ended = self._inbox.popleft()
            text = self._texts[index].add(token, last=ended)
            output = self._output(index) if ended else None
        except BaseException:
            self.close()
            raise
        if ended:
            self._open.discard(index)
            if not self._open:
                self.close()
        return StreamOutput(index, token, text, output)

    def abort(self, index: int) -> None:
        """End one request; its output holds the tokens that it has so far. A request that has ended stays as it is."""
        if index in self._open and not any(token.prompt_index == index and token.ended for token in self._inbox):
            self._abort(index)
            self._inbox.append(StreamedToken(index, None, True))

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
