"""The tokenizer of a model: its checkpoint's, or one that takes text as bytes; and the ids that end a request."""

import json
import logging
from pathlib import Path
from typing import Any

from hybridcache.errors import bad
from hybridcache.workloads.byte_tokenizer import ByteTokenizer, Tokenizer

_LOG = logging.getLogger(__name__)

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def read_tokenizer(folder: Path | None, vocabulary: int) -> Tokenizer | None:
    """The tokenizer in a checkpoint's folder; where there is none (or no folder), one that takes text as bytes, or None
    where the model's ``vocabulary`` has no room for those.

    Raises:
        UserError: Transformers cannot read the tokenizer's files.
    """
    if folder is not None and any((folder / name).is_file() for name in _FILES):
        from transformers import AutoTokenizer

        loader: Any = AutoTokenizer
        try:
            return loader.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # Transformers raises many types here, all for files that it cannot use
            reason = " ".join(str(error).split())
            raise bad("model", str(folder), f"its tokenizer files cannot be read ({reason})") from error
    if vocabulary < ByteTokenizer.vocab_size:
        return None
    if folder is not None and folder.is_dir():
        _LOG.warning("%s has no tokenizer: text is taken as bytes", folder)
    return ByteTokenizer(vocabulary)


def eos_token_ids(folder: Path, config: Any, tokenizer: Tokenizer | None) -> list[int]:
    """The ids that end a request, from the checkpoint's generation config, else its config, else its tokenizer."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
