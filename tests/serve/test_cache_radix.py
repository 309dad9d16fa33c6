"""The radix tree against a dict of whole sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nomatmul.serve.radix import Node, RadixTree

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def ids_of(sequence: list[int]) -> np.ndarray:
    return np.array(sequence, np.int32)


class Tree(RuleBasedStateMachine):
    """Insert, look up and remove in any order; ids are few, so that edges split and join."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: RadixTree[int] = RadixTree()
        self.nodes: dict[tuple[int, ...], Node[int]] = {}
        self.count = 0

    @rule(sequence=SEQUENCES)
    def insert(self, sequence: list[int]) -> None:
        array = ids_of(sequence)
        node = self.tree.insert(array)
        array[:] = 99  # the tree keeps its own
        self.count += 1
        known = self.nodes.get(tuple(sequence))
        assert node.value == (None if known is None else known.value)
        node.value = self.count
        self.nodes[tuple(sequence)] = node

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.nodes:
            key = data.draw(st.sampled_from(sorted(self.nodes)))
            self.tree.remove(self.nodes.pop(key))

    @rule(sequence=SEQUENCES)
    def match(self, sequence: list[int]) -> None:
        found = self.tree.match(ids_of(sequence))
        prefixes = [tuple(sequence[:end]) for end in range(len(sequence) + 1)]
        shared = [p for p in prefixes if any(key[: len(p)] == p for key in self.nodes)]
        assert found.common == max(map(len, shared), default=0)
        on_the_way = [node.value for node in (found.node, *found.node.above()) if node.value]
        assert on_the_way == [self.nodes[p].value for p in reversed(prefixes) if p in self.nodes]
        common = tuple(sequence[: found.common])
        below = {node.value for node in found.below.below() if node.value is not None}
        assert below == {n.value for key, n in self.nodes.items() if key[: len(common)] == common}

    @invariant()
    def holds(self) -> None:
        nodes = list(self.tree.root.below())
        assert self.tree.size == sum(len(node.edge) for node in nodes)
        assert {tuple(n.ids().tolist()): n for n in nodes if n.value is not None} == self.nodes
        for node in nodes:
            if node is not self.tree.root:
                assert node.value is not None or len(node.children) > 1  # nothing idle
                assert node.edge.base is None  # no view that keeps a whole prompt in memory


Tree.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTree = Tree.TestCase
