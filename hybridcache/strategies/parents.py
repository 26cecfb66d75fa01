"""Parents: blocks that are cut into equal children, which several requests may share."""

from collections.abc import Iterable, Sequence

from hybridcache.memory.free_list import FreeList


class Parents:
    """The blocks that are bound to children now, bucketed by how many of their children are used.

    Child ``c`` of block ``b`` has the number ``b * children + c``.
    """

    def __init__(self, children: int) -> None:
        self.children = children
        self.free_children = 0
        self._free: dict[int, list[int]] = {}
        """Free children of every bound block."""
        self._by_used: list[dict[int, None]] = [{} for _ in range(children + 1)]

    def open(self, block: int, count: int) -> list[int]:
        """Bind an empty block and take its first ``count`` children (at least one)."""
        first = block * self.children
        self._free[block] = list(range(first + self.children - 1, first + count - 1, -1))
        self._by_used[count][block] = None
        self.free_children += self.children - count
        return list(range(first, first + count))

    def fullest(self) -> int | None:
        """The fullest block with a free child; None where there is none."""
        if self.free_children == 0:
            return None
        return next(next(reversed(self._by_used[n])) for n in range(self.children - 1, 0, -1) if self._by_used[n])

    def among(self, blocks: Iterable[int]) -> int | None:
        """The first of these bound blocks that has a free child; None where there is none."""
        return next((block for block in blocks if self._free[block]), None)

    def take(self, block: int, count: int) -> list[int]:
        """Up to ``count`` free children of a bound block."""
        free = self._free[block]
        count = min(count, len(free))
        used = self.children - len(free)
        del self._by_used[used][block]
        self._by_used[used + count][block] = None
        self.free_children -= count
        taken = free[: -count - 1 : -1]
        del free[-count:]
        return taken

    def take_one(self) -> int | None:
        """A child of the fullest block that has one free; None where none has."""
        if self.free_children == 0:
            return None
        used = self.children - 1
        while not (bucket := self._by_used[used]):
            used -= 1
        block, _ = bucket.popitem()
        self._by_used[used + 1][block] = None
        self.free_children -= 1
        return self._free[block].pop()

    def give(self, children: Iterable[int], free: FreeList) -> None:
        """Take children back; blocks that are empty then go to the free list."""
        for emptied in map(self.put, children):
            if emptied is not None:
                free.put(emptied)

    def put(self, child: int) -> int | None:
        """Give a child back. Returns its block if that is empty now (and no longer bound)."""
        block = child // self.children
        used = self.children - len(self._free[block])
        del self._by_used[used][block]
        if used == 1:
            del self._free[block]
            self.free_children -= self.children - 1
            return block
        self._free[block].append(child)
        self._by_used[used - 1][block] = None
        self.free_children += 1
        return None

    def check(self, held: Sequence[int]) -> None:
        """Every child of a bound block is held once or free once."""
        free = {child for children in self._free.values() for child in children}
        assert len(free) == self.free_children
        used = set(held)
        assert len(used) == len(held), "a child has two owners"
        assert not used & free, "a held child is free"
        assert len(held) + len(free) == self.children * len(self._free), "a child is lost"
        for count, blocks in enumerate(self._by_used):
            for block in blocks:
                assert self.children - len(self._free[block]) == count
