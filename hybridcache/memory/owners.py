"""Owners: who holds which states and which KV entries, where several may hold the same.

An owner is a *resident* (a request that runs) or a *cached* owner (a checkpoint: nobody runs). The states of all layers are
held together, as one :class:`StateSet`. KV is shared from the start of a sequence, so what owners have in common is a path of
a tree: a :class:`Segment` is a stretch of entries with the same owners, and holding a segment means holding all before it.
Counts lie on sets and segments, so memory that is not shared costs nothing to count.
"""

from array import array
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class StateSet:
    """The states of one sequence at one position."""

    units: MutableSequence[int]
    """What the strategy allotted; compaction renumbers them in place."""
    table: Sequence[int]
    """What kernels read: an entry for every state layer, or one that all of them share."""
    owners: int = 0
    residents: int = 0
    """Residents among the owners."""


class Segment:
    """Consecutive KV entries of a sequence behind those of ``parent``."""

    __slots__ = ("end", "entries", "holders", "parent", "residents")

    def __init__(self, parent: "Segment | None", entries: array, end: int) -> None:
        self.parent = parent
        self.entries = entries
        self.end = end
        """Entries from the start of the sequence to the last one here."""
        self.holders = 0
        """Owners whose path ends here, and segments that follow."""
        self.residents = 0
        """Residents whose path leads through here."""

    def path(self) -> Iterator["Segment"]:
        """This segment and all before it, last first."""
        node: Segment | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(eq=False, slots=True)
class Resident:
    """What a running request holds."""

    states: StateSet
    """What its next step writes."""
    kv: array = field(default_factory=lambda: array("i"))
    """All its entries in order of position: those of ``prefix``, then its own."""
    prefix: Segment | None = None
    shared: int = 0
    """Entries of ``prefix``."""
    extra: Sequence[int] = ()
    """State units beside its states."""

    def own(self) -> array:
        """Entries that no segment holds."""
        return self.kv[self.shared :] if self.shared else self.kv


@dataclass(eq=False, slots=True)
class Checkpoint:
    """What a cached owner holds: states at a position, and the KV before it."""

    states: StateSet
    kv: Segment
    num_tokens: int


class SharedKv:
    """The segments of one pool, and how many of their entries count as what.

    Args:
        give: takes back entries that nobody holds any more.
    """

    def __init__(self, give: Callable[[array], None]) -> None:
        self._give = give
        self.cached = 0
        """Entries that only cached owners hold."""
        self.repeated = 0
        """Entries of residents that another resident holds too: the sum over entries of ``residents - 1``."""

    def publish(self, one: Resident, end: int) -> Segment:
        """The segment that ends with entry ``end - 1`` of a resident, made of its own entries where there is none yet."""
        if end > one.shared:
            made = Segment(one.prefix, one.kv[one.shared : end], end)
            made.holders = made.residents = 1  # the hold on the prefix is the new segment's now
            one.prefix, one.shared = made, end
            return made
        assert one.prefix is not None
        return self.ending(one.prefix, end)

    def ending(self, leaf: Segment, end: int) -> Segment:
        """The segment on the way to ``leaf`` that ends with entry ``end - 1`` (from the start); one is divided if need be."""
        node = next(n for n in leaf.path() if n.end - len(n.entries) < end <= n.end)
        if end == node.end:
            return node
        inside = end - (node.end - len(node.entries))
        head = Segment(node.parent, node.entries[:inside], end)
        head.holders, head.residents = 1, node.residents
        node.parent, node.entries = head, node.entries[inside:]
        return head

    def enter(self, leaf: Segment) -> None:
        """A resident holds the path from now on."""
        leaf.holders += 1
        for node in leaf.path():
            if node.residents:
                self.repeated += len(node.entries)
            else:
                self.cached -= len(node.entries)
            node.residents += 1

    def leave(self, leaf: Segment) -> None:
        """A resident holds the path no longer."""
        for node in leaf.path():
            node.residents -= 1
            if node.residents:
                self.repeated -= len(node.entries)
            else:
                self.cached += len(node.entries)
        self.let_go(leaf)

    def let_go(self, leaf: Segment) -> None:
        """One holder of ``leaf`` less; what nobody holds goes back."""
        node: Segment | None = leaf
        while node is not None:
            node.holders -= 1
            if node.holders:
                return
            assert node.residents == 0
            self.cached -= len(node.entries)
            self._give(node.entries)
            node = node.parent
