"""RadixIndex: which tokens have been seen, and where on their way the states were kept.

A tree over token ids with compressed edges. A node ends where two sequences part, where a checkpoint lies, or where a
sequence ended. Nodes need no memory of the pool: one whose checkpoint was evicted, or that never had one, tells that its
tokens were seen (from which branch points and times of reuse are learnt). The tokens that such nodes hold are bounded; those
seen longest ago go first.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hybridcache.errors import whole

HISTORY_TOKENS = 1 << 24
"""Tokens of sequences without a checkpoint that are remembered: 64 MiB of host memory."""


class Node:
    """The end of an edge: the tokens from the root to here are the node's prefix."""

    __slots__ = ("children", "edge", "end", "hosted", "maker", "owner", "parent", "point")

    def __init__(self, parent: "Node | None", tokens: np.ndarray, end: int) -> None:
        self.parent = parent
        self.edge = tokens.tobytes()
        """The edge's tokens, int32, as bytes: these compare at the speed of memory, with no more overhead than a call."""
        self.end = end
        """Tokens from the root to here."""
        self.children: dict[int, Node] = {}
        """By the first token of their edge."""
        self.point: Any = None
        """What is known of a checkpoint here (:class:`~hybridcache.prefix.points.Point`), one that was evicted too."""
        self.owner: int | None = None
        """The request that came through here last."""
        self.maker: int | None = None
        """A running request that is about to keep a checkpoint here."""
        self.hosted = 0
        """Checkpoints here and behind here that have a copy in host memory."""

    @property
    def tokens(self) -> np.ndarray:
        """The edge's tokens, int32."""
        return np.frombuffer(self.edge, dtype=np.int32)

    def path(self) -> Iterator["Node"]:
        """This node and those before it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def prefix(self) -> np.ndarray:
        """All tokens from the root to here."""
        edges = [node.edge for node in self.path()]
        return np.frombuffer(b"".join(edges[::-1]), dtype=np.int32)


class Walk(NamedTuple):
    """How far a sequence has been seen."""

    node: Node
    """The last node whose prefix the sequence begins with."""
    length: int
    """Leading tokens that have been seen; beyond ``node.end`` they lie on an edge."""
    edge: Node | None
    """The end of that edge; None where the walk ended on ``node``."""


class RadixIndex:
    """See the module.

    Args:
        history_tokens: most tokens that are remembered without a checkpoint behind them.
    """

    def __init__(self, history_tokens: int = HISTORY_TOKENS) -> None:
        self.history_tokens = whole("history_tokens", history_tokens, 0)
        self._scratch = bytearray()
        """Tokens of the last walk, to be compared as bytes; memory of its own would cost more than the walk."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.root = Node(None, np.empty(0, dtype=np.int32), 0)
        self.num_nodes = 0
        self._seen: OrderedDict[Node, int] = OrderedDict()
        """Leaves without a live checkpoint and the tokens of their edges; the one seen longest ago comes first."""
        self._seen_tokens = 0

    def walk(self, tokens: np.ndarray) -> Walk:
        """Follow a sequence (int32) as far as it has been seen."""
        node, at, count = self.root, 0, len(tokens)
        if len(self._scratch) < count * 4:
            self._scratch = bytearray(count * 8)
        np.frombuffer(self._scratch, dtype=np.int32)[:count] = tokens
        first, begins = memoryview(self._scratch).cast("i"), self._scratch.startswith
        while at < count:
            child = node.children.get(first[at])
            if child is None:
                break
            end = child.end
            if end > count or not begins(child.edge, at * 4):
                return Walk(node, at + _common(child.tokens, tokens[at:end]), child)
            node, at = child, end
        return Walk(node, at, None)

    def insert(self, tokens: np.ndarray, walk: Walk | None = None) -> Node:
        """The node at which the sequence (int32, at least one token) ends, made where there is none.

        Args:
            walk: of this sequence or of one that begins with it, where the index has not changed since.
        """
        if walk is None or walk.length > len(tokens):
            walk = self.walk(tokens)
        node, length, edge = walk
        if edge is not None and length > node.end:
            node = self._divide(edge, length)
        if length < len(tokens):
            self._unsee(node)
            leaf = Node(node, tokens[length:], len(tokens))
            node.children[int(tokens[length])] = leaf
            self.num_nodes += 1
            node = leaf
        if not node.children:
            self.see(node)
        return node

    def see(self, node: Node) -> None:
        """A leaf was seen now, or its checkpoint came to life or ended. Without a live one it is remembered for a while."""
        if node.children or node is self.root:
            return
        self._unsee(node)
        if node.hosted or (node.point is not None and node.point.live):
            return
        self._seen[node] = _length(node)
        self._seen_tokens += _length(node)
        while self._seen_tokens > self.history_tokens and len(self._seen) > 1:
            self._forget(next(iter(self._seen)))

    def nodes(self) -> Iterator[Node]:
        """All nodes, in no order, without the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check(self) -> None:
        """Raise AssertionError where the tree does not add up."""
        nodes = list(self.nodes())
        assert len(nodes) == self.num_nodes
        for node in nodes:
            assert node.parent is not None
            assert node.end == node.parent.end + _length(node) > node.parent.end
            assert node.parent.children[int(node.tokens[0])] is node
            live = node.point is not None and node.point.live
            assert (node in self._seen) == (not node.children and not live and not node.hosted), (
                "a leaf is lost, or remembered for nothing"
            )
        assert self._seen_tokens == sum(_length(node) for node in self._seen)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _divide(self, child: Node, end: int) -> Node:
        """Cut the edge to ``child`` at position ``end``; the node made there."""
        parent = child.parent
        assert parent is not None
        inside = end - parent.end
        head = Node(parent, child.tokens[:inside], end)
        head.owner, head.hosted = child.owner, child.hosted
        parent.children[int(head.tokens[0])] = head
        child.parent, child.edge = head, child.edge[inside * 4 :]
        head.children[int(child.tokens[0])] = child
        self.num_nodes += 1
        if child in self._seen:
            self._seen[child] = _length(child)
            self._seen_tokens -= inside
        return head

    def _unsee(self, node: Node) -> None:
        self._seen_tokens -= self._seen.pop(node, 0)

    def _forget(self, node: Node) -> None:
        """Drop a leaf, and what is left without use before it."""
        self._unsee(node)
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.tokens[0])]
        self.num_nodes -= 1
        if node.point is not None:
            node.point.forgotten()
        if parent is self.root:
            return
        if not parent.children:
            if not parent.hosted and (parent.point is None or not parent.point.live):
                self._seen[parent] = _length(parent)
                self._seen.move_to_end(parent, last=False)
                self._seen_tokens += _length(parent)
        elif len(parent.children) == 1 and parent.point is None and parent.maker is None:
            self.join(parent)

    def trim(self, node: Node) -> None:
        """Take out a node at which nothing lies any more, with those before it that led only there."""
        if node.children:
            if len(node.children) == 1:
                self.join(node)
            return
        while node is not self.root and node.point is None and not node.children:
            parent = node.parent
            assert parent is not None
            self._forget(node)
            node = parent

    def join(self, node: Node) -> None:
        """Take out a node at which nothing ends any more."""
        (child,) = node.children.values()
        before = node.parent
        assert before is not None
        inside = _length(node)
        child.edge = node.edge + child.edge
        child.parent = before
        before.children[int(child.tokens[0])] = child
        self.num_nodes -= 1
        if child in self._seen:
            self._seen[child] += inside
            self._seen_tokens += inside


def _length(node: Node) -> int:
    """Tokens of its edge."""
    return len(node.edge) // 4


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Leading elements that are equal."""
    count = min(len(a), len(b))
    differ = a[:count] != b[:count]
    first = int(differ.argmax()) if count else 0
    return first if count and differ[first] else count
