"""Point: what is known of one checkpoint, alive or evicted."""

import math
from enum import Enum, IntEnum
from typing import Any

from hybridcache.prefix.index import Node


class Place(Enum):
    """Why a checkpoint lies where it does."""

    PROMPT_END = "prompt_end"
    GENERATION_END = "generation_end"
    INSIDE = "inside"
    BRANCH = "branch"
    EXPLICIT = "explicit"
    FORK = "fork"
    """Siblings resume from it; it is gone once all of them have."""

    @property
    def semantic(self) -> bool:
        """Whether a turn ends here, or its user asked for it."""
        return self not in (Place.INSIDE, Place.BRANCH, Place.FORK)


class Standing(IntEnum):
    """What the sequence of a checkpoint has done since."""

    LATEST = 0
    """Nothing: it can only be resumed from here."""
    SUPERSEDED = 1
    """It went on to a later checkpoint."""
    ABANDONED = 2
    """It went on from an earlier checkpoint, another way."""


class Point:
    """A checkpoint: the states after, and the KV of, its node's prefix.

    While it is *live*, the strategy holds its bytes under ``key``. Evicted, it stays in the index as long as its tokens are
    remembered: a request that would have resumed from it tells when it would have been worth its bytes.
    """

    __slots__ = (
        "active_s", "credit", "host", "key", "live", "made_s", "mean_log_interval", "next_use_s", "node", "pinned", "place",
        "serial", "slot", "standing", "touched_s", "uses", "wanted",
    )  # fmt: skip

    def __init__(self, key: int, node: Node, place: Place, now_s: float) -> None:
        self.key, self.node, self.place = key, node, place
        self.live = True
        self.made_s = self.touched_s = now_s
        """When it was made; when it was made or a request last resumed from it."""
        self.active_s = now_s
        """When its sequence was last worked on: the wait for its reuse began then."""
        self.uses = 0
        """Times that it, and the checkpoints that it continues, were resumed from."""
        self.mean_log_interval = 0.0
        """Mean of log(1 + seconds) between these."""
        self.standing = Standing.LATEST
        self.wanted = 0
        """Waiting requests that are going to resume from it."""
        self.pinned = False
        """Whether it is never evicted for another checkpoint (LLM.pin)."""
        self.next_use_s = math.inf
        """When a request will resume from it, where the future is told (:meth:`PrefixCache.foretell`)."""
        self.host: Any = None
        """Its copy in host memory."""
        self.serial = 0
        """Version of its place in an eviction order."""
        self.slot = -1
        """Its place among the candidates of a sampled order."""
        self.credit = 0.0
        """What an eviction order keeps of its last touch."""

    @property
    def position(self) -> int:
        """Tokens of its prefix."""
        return self.node.end

    def touch(self, now_s: float) -> None:
        """A request resumed from it."""
        interval = math.log1p(max(now_s - self.active_s, 0.0))
        self.uses += 1
        self.mean_log_interval += (interval - self.mean_log_interval) / min(self.uses, 8)
        self.touched_s = self.active_s = now_s

    def inherit(self, earlier: "Point") -> None:
        """It continues the sequence of an earlier checkpoint, whose times of reuse are the best guess for its own."""
        self.uses, self.mean_log_interval = earlier.uses, earlier.mean_log_interval

    def live_before(self) -> "Point | None":
        """The deepest live checkpoint before this one on its path."""
        node = self.node.parent
        while node is not None:
            if node.point is not None and node.point.live:
                return node.point
            node = node.parent
        return None

    def live_after(self) -> "list[Point]":
        """The first live checkpoints behind this one, one on each path."""
        found, stack = [], list(self.node.children.values())
        while stack:
            node = stack.pop()
            if node.point is not None and node.point.live:
                found.append(node.point)
            else:
                stack.extend(node.children.values())
        return found

    def forgotten(self) -> None:
        """Its tokens are no longer remembered."""
        assert not self.live
