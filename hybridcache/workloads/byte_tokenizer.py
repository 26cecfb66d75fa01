"""ByteTokenizer: text as its UTF-8 bytes, for models that come without a tokenizer (random weights).

Id ``b + 3`` is byte ``b``; ids 0, 1 and 2 are padding, begin and end. Every text encodes and comes back unchanged.
"""

from collections.abc import Sequence

from hybridcache.errors import bad


class ByteTokenizer:
    """Encodes to, and decodes from, ids ``0 .. 258``.

    Args:
        model_vocabulary: the model's number of token ids.

    Raises:
        UserError: the model has fewer ids than bytes and specials.
    """

    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    offset = 3
    vocab_size = offset + 256

    def __init__(self, model_vocabulary: int) -> None:
        if model_vocabulary < self.vocab_size:
            raise bad(
                "vocab_size",
                model_vocabulary,
                f"text as bytes needs {self.vocab_size} ids; give prompts as token ids, or a checkpoint with a tokenizer",
            )

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes, each plus 3. Nothing is added in front or behind."""
        return [byte + self.offset for byte in text.encode("utf-8")]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text; an id above all bytes (a model may know more) and a broken UTF-8 sequence read as U+FFFD."""
        names = {self.pad_token_id: "<pad>", self.bos_token_id: "<bos>", self.eos_token_id: "<eos>"}
        data = bytearray()
        for token in token_ids:
            if token >= self.vocab_size:
                data += "\ufffd".encode()
            elif token >= self.offset:
                data.append(token - self.offset)
            elif not skip_special_tokens:
                data += names[token].encode()
        return data.decode("utf-8", errors="replace")
