"""WithoutHost: what drivers ask of a prefix cache about host memory, of one that has none."""

from typing import Any


class WithoutHost:
    """Nothing is kept in host memory."""

    host = None
    host_bytes = 0
    host_hit_tokens = 0
    recalling = False

    def preempting(self, seq: Any) -> None:
        """A request is about to lose its memory; nothing of it is copied."""
