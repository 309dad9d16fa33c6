"""The order in which a walk meets the nodes of trees: level by level, tree by tree.

Three counters of a walk follow the same order at different times (what is asked of memory, what
comes back, what is decided), so the order is one component. Visits are *kept* tree by tree, as the
oracle has them (reference/trees.py): the visit of level l of tree t has the index t * levels + l.

Legend: T trees, L levels (depth + 1), A = T * L visits.
"""

from __future__ import annotations

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

LEVEL_BITS = 6  # depth has 5


class Visits(wiring.Component):
    """Counts through (level, tree): `start` sets it to the first, `next` goes on.

    trees, levels: held while it counts. tree, index: of this visit; root: `first_level` and tree 0
    included, the row of the tree's first node, where `nodes` is the number of a tree's nodes;
    done: behind the last visit.
    """

    def __init__(self, visits: int, row_bits: int) -> None:
        super().__init__(
            {
                "start": In(1),
                "next": In(1),
                "trees": In(range(visits + 1)),
                "levels": In(LEVEL_BITS),
                "nodes": In(row_bits),
                "tree": Out(range(visits)),
                "index": Out(range(visits)),
                "root": Out(row_bits),
                "first_level": Out(1),
                "last": Out(1),
                "done": Out(1, init=1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        level = Signal(LEVEL_BITS)
        last_tree = Signal()
        m.d.comb += [
            last_tree.eq(self.tree + 1 == self.trees),
            self.last.eq(last_tree & (level + 1 == self.levels)),
            self.first_level.eq(level == 0),
        ]
        with m.If(self.start):
            m.d.sync += [
                level.eq(0),
                self.tree.eq(0),
                self.index.eq(0),
                self.root.eq(0),
                self.done.eq(0),
            ]
        with m.Elif(self.next & ~self.done):
            m.d.sync += [
                self.tree.eq(self.tree + 1),
                self.index.eq(self.index + self.levels),
                self.root.eq(self.root + self.nodes),
                self.done.eq(self.last),
            ]
            with m.If(last_tree):
                m.d.sync += [
                    self.tree.eq(0),
                    self.index.eq(level + 1),
                    self.root.eq(0),
                    level.eq(level + 1),
                ]
        return m
