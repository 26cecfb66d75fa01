"""ChunkEndPrefix: lmdeploy's prefix caching of hybrid models, over large_block, or over static_split as
``lmdeploy_0.18``.

States are kept at the end of every prefill chunk, and nowhere else: neither where prompts part nor where a request
ends. KV is kept up to them. Where blocks are short, the leaf of the tree goes that was used longest ago; a match
refreshes its path.

lmdeploy matches whole blocks. Here the chunk's end may lie inside a block, whose part is copied: that favours the peer.
"""

from typing import Any, ClassVar

from hybridcache.prefix.peers.radix import RadixPrefix


class ChunkEndPrefix(RadixPrefix):
    """See the module."""

    donates: ClassVar[bool] = False
    branches: ClassVar[bool] = False
    one_order: ClassVar[str | None] = "kv"

    def __init__(self, strategy: Any, chunk_tokens: int = 8192) -> None:
        super().__init__(strategy, None, chunk_tokens)
        self.buffered = False
