"""CarvePrefix: lcm_carve with a prefix cache, by Jenga's order and by TokenSpeed's.

Memory for a request is looked for in the order of the strategy: ``jenga`` takes a free child of a large page that the
request uses, then an empty large page; ``fullest`` (TokenSpeed) fills the fullest large page first. Then a large page
is evicted, then any free child is taken (Jenga, arXiv 2503.18292, section 5). A large page that can be evicted as a
whole is always one of states, since one holds one request's; so the states that a request resumed from longest ago go,
with the KV that only they made of use.

* Only the states that a request resumes from are refreshed, as Jenga refreshes what a layer of that type reads.
* States are kept as TokenSpeed keeps them: once in a prefill chunk, at its end or at the place up to which KV was found
  beyond them, and where a request ends.

Left out: a KV page whose states are gone may stay in Jenga's cache until its turn comes. Nothing can resume from it.
"""

from typing import Any, ClassVar

from hybridcache.prefix.peers.radix import RadixPrefix


class CarvePrefix(RadixPrefix):
    """See the module."""

    one_order: ClassVar[str | None] = "states"

    def __init__(self, strategy: Any, chunk_tokens: int = 8192) -> None:
        super().__init__(strategy, None, chunk_tokens)
        self.refreshes_path = False
