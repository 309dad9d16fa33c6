"""A radix tree over token ids: which of the sequences in it does a new one go on from?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Ids = NDArray[np.int32]


class Node(Generic[T]):
    """A place in the tree: `edge` leads to it from its parent, `end` ids from the root.

    value: None where the tree only forks. children: by the first id of their edge.
    """

    __slots__ = ("children", "edge", "end", "parent", "value")

    def __init__(self, edge: Ids, parent: Node[T] | None) -> None:
        self.edge, self.parent = edge, parent
        self.end: int = len(edge) + (parent.end if parent else 0)
        self.children: dict[int, Node[T]] = {}
        self.value: T | None = None

    def above(self) -> Iterator[Node[T]]:
        """The nodes on the way to the root, which comes last."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator[Node[T]]:
        """The node itself and all nodes that lead on from it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def ids(self) -> Ids:
        """int32 [end]: all ids from the root."""
        edges = [self.edge, *(node.edge for node in self.above())]
        return np.concatenate(edges[::-1])


@dataclass(frozen=True)
class Match(Generic[T]):
    """How far a sequence goes along with the tree.

    node: the last node that it reaches. common: ids that it shares with the tree. below: the node
    whose subtree holds all sequences that begin with these ids (`node`, or the end of the edge
    in which the sequence leaves the tree).
    """

    node: Node[T]
    common: int
    below: Node[T]


class RadixTree(Generic[T]):
    """Values by sequences of token ids. size: the ids of all edges."""

    def __init__(self) -> None:
        self.root: Node[T] = Node(np.zeros(0, np.int32), None)
        self.size = 0

    def match(self, ids: Ids) -> Match[T]:
        """Follow a sequence of ids into the tree."""
        node, at = self.root, 0
        while at < len(ids):
            child = node.children.get(int(ids[at]))
            if child is None:
                break
            same = _common(child.edge, ids[at:])
            at += same
            if same < len(child.edge):
                return Match(node, at, child)
            node = child
        return Match(node, at, node)

    def insert(self, ids: Ids) -> Node[T]:
        """Return the node of a sequence, a new one where there was none; give it a value then."""
        match = self.match(ids)
        node = match.node
        if match.below is not node:
            node = self._split(match.below, match.common - node.end)
        if node.end < len(ids):
            child = Node(ids[node.end :].copy(), node)  # a view would keep all ids in memory
            node.children[int(child.edge[0])] = child
            self.size += len(child.edge)
            node = child
        return node

    def remove(self, node: Node[T]) -> None:
        """Take the value of a node away, and nodes that hold nothing any longer."""
        node.value = None
        while node.parent is not None and node.value is None and not node.children:
            parent = node.parent
            del parent.children[int(node.edge[0])]
            self.size -= len(node.edge)
            node = parent
        if node.parent is not None and node.value is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge = np.concatenate([node.edge, child.edge])
            child.parent = node.parent
            node.parent.children[int(child.edge[0])] = child

    def _split(self, node: Node[T], length: int) -> Node[T]:
        """A new node within the edge that leads to this one."""
        assert node.parent is not None
        assert 0 < length < len(node.edge)
        middle = Node(node.edge[:length].copy(), node.parent)
        node.parent.children[int(middle.edge[0])] = middle
        node.edge, node.parent = node.edge[length:].copy(), middle
        middle.children[int(node.edge[0])] = node
        return middle


def _common(one: Ids, other: Ids) -> int:
    """How many ids both begin with."""
    count = min(len(one), len(other))
    differ = one[:count] != other[:count]
    first = int(differ.argmax()) if count else 0
    return first if count and differ[first] else count
