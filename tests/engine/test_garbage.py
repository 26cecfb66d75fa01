"""The settled heap: what lives is exempt, what died since the last time is freed all the same."""

import gc
import weakref

from hybridcache.engine.garbage import settle_heap


class Node:
    def __init__(self) -> None:
        self.me = self


def test_the_living_are_exempt_and_the_dead_are_freed():
    node = Node()
    try:
        settle_heap()
        frozen = gc.get_freeze_count()
        assert frozen > 1000
        dead = weakref.ref(node)
        del node
        gc.collect()
        assert dead() is not None, "exempt: a cycle that was alive is not looked at"
        settle_heap()
        assert dead() is None
    finally:
        gc.unfreeze()
