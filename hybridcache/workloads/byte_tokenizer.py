"""ByteTokenizer: text as its UTF-8 bytes, for models that come without a tokenizer (random weights).

Ids 0 to 255 are the bytes; 256, 257 and 258 are begin, end and padding, as in the shipped ``tiny`` config. Every text
encodes and comes back unchanged.
"""

from collections.abc import Sequence
from typing import Protocol

from hybridcache.errors import bad


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Transformers have it."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class ByteTokenizer:
    """Encodes to, and decodes from, ids ``0 .. 258``.

    Args:
        model_vocabulary: the model's number of token ids; it may exceed the tokenizer's.

    Raises:
        UserError: the model has fewer ids than bytes and specials.
    """

    bos_token_id = 256
    eos_token_id = 257
    pad_token_id = 258
    vocab_size = 259

    def __init__(self, model_vocabulary: int) -> None:
        if model_vocabulary < self.vocab_size:
            raise bad(
                "vocab_size",
                model_vocabulary,
                f"text as bytes needs {self.vocab_size} ids; give prompts as token ids, or a checkpoint with a tokenizer",
            )

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes. Nothing is added in front or behind."""
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text. Broken UTF-8 and ids that stand for nothing (a model may know more) read as U+FFFD."""
        names = {self.bos_token_id: "<bos>", self.eos_token_id: "<eos>", self.pad_token_id: "<pad>"}
        data = bytearray()
        for token in token_ids:
            if token < 256:
                data.append(token)
            elif token not in names:
                data += "\ufffd".encode()
            elif not skip_special_tokens:
                data += names[token].encode()
        return data.decode("utf-8", errors="replace")
