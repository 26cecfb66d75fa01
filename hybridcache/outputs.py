"""What comes of prompts: whole outputs, and TokenStream, an iterator over tokens as they come."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

INCOMPLETE = "\ufffd"
"""What a tokenizer gives for the first bytes of a character whose others have not come."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt. Times are seconds since the LLM's first request."""

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
    """Which of the stream's prompts."""
    token_id: int | None
    """None where a request ended without another token (``abort``, ``error``)."""
    text: str | None
    """What the token adds to the text: nothing while it is part of a character; None where the model has no tokenizer."""
    output: RequestOutput | None
    """The whole output, once, with the request's last token or its end."""


class TextPieces:
    """Turns tokens into pieces of text that together are the text."""

    def __init__(self, tokenizer: Decoder | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        """First token that the next piece is decoded with: words are joined differently at a text's start."""
        self._told = 0
        """Tokens whose text is out."""

    def add(self, token_id: int | None, *, last: bool) -> str | None:
        """The text that a token adds. What an unfinished character holds back comes with the rest of it, or at the end."""
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
    """Iterates over tokens in the order in which steps give them. Several streams, and ``LLM.generate``, may run beside one
    another: whichever is asked advances all, and each gets its own tokens.

    Closing it (or leaving its ``with`` block, dropping it, or an exception of :meth:`__next__`) ends its requests; their
    memory is free.
    """

    def __init__(
        self,
        ids: Sequence[int],
        inbox: deque[tuple[int, int | None, bool]],
        advance: Callable[[], object],
        abort: Callable[[int], object],
        output: Callable[[int], RequestOutput],
        drop: Callable[[], object],
        tokenizer: Decoder | None,
    ) -> None:
        """``inbox`` is filled by ``advance`` with ``(index, token or None, whether the request has ended)``."""
        self._ids = ids
        self._inbox = inbox
        self._advance, self._abort, self._output, self._drop = advance, abort, output, drop
        self._texts = [TextPieces(tokenizer) for _ in ids]
        self._open = set(range(len(ids)))

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
        """End one request; what it has so far comes as its output. Nothing happens where it has ended."""
        if index in self._open and not any(entry[0] == index and entry[2] for entry in self._inbox):
            self._abort(index)
            self._inbox.append((index, None, True))

    def close(self) -> None:
        """End what has not ended."""
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
    """Ctrl-C waits for the end of the block, so that it cannot fall into the middle of bookkeeping. A second one does not
    wait. Elsewhere than in the main thread, or where the program handles it itself, nothing changes."""
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
