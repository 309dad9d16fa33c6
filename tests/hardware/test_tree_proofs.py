"""Proofs about the unit of trees: every visit is counted once, a node is asked for only behind its
parent's sum, no result is lost or doubled, no column is read while its sum is on the way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from amaranth import Elaboratable, Module, Signal
from amaranth.hdl import Assert, Assume
from hardware import formal
from hardware.tree_bench import SMALL

from nomatmul.hardware.rtl.combine import Combine
from nomatmul.hardware.rtl.visits import LEVEL_BITS, Visits
from nomatmul.hardware.rtl.walk import Walk

DESIGN = dataclasses.replace(
    SMALL, memory_bits=16, combine_lanes=8, tree_rows=4, vector_words=64, sum_bits=12, burst=1,
    fifo_words=4,
)  # fmt: skip


class Once(Elaboratable):
    """Of trees and levels of any number up to three: each index is met once, parents before
    children. `fault` leaves the last level out."""

    def __init__(self, fault: bool = False) -> None:
        self.fault = fault

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.visits = visits = Visits(16, 4)
        trees, levels = formal.watched(m, 2, "trees"), formal.watched(m, 2, "levels")
        index = formal.watched(m, 4, "index")
        begun, running, met, child_met = (Signal(name=n) for n in ("begun", "run", "met", "child"))
        m.d.sync += begun.eq(1)
        m.d.comb += [
            Assume((trees != 0) & (levels != 0) & (index < trees * levels)),
            visits.start.eq(~begun),
            visits.next.eq(formal.free(m, 1)),
            visits.trees.eq(trees),
            visits.levels.eq(levels - self.fault if self.fault else levels),
            visits.nodes.eq(1),
            running.eq(begun & ~visits.done),
        ]
        with m.If(running & visits.next & (visits.index == index)):
            m.d.sync += met.eq(1)
            m.d.comb += Assert(~met)
        with m.If(running & visits.next & (visits.index == index + 1)):
            m.d.sync += child_met.eq(1)
        with m.If(running):
            m.d.comb += Assert(visits.tree == visits.root)  # nodes = 1
            m.d.comb += Assert(visits.index < trees * levels)
        with m.If(begun & visits.done):
            m.d.comb += Assert(met)
        # the next index is a child unless it is another tree's root
        with m.If(child_met & ((index + 1) % levels != 0)):
            m.d.comb += Assert(met)
        assert len(levels) < LEVEL_BITS
        return m


class Asked(Elaboratable):
    """A walk asks for no more records than it has trees and sums, and gives each sum on once. What
    holds besides is there for the induction. `fault`: of a neighbour whose sums nobody asked for.
    """

    def __init__(self, fault: bool = False) -> None:
        self.fault = fault

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.walk = walk = Walk(DESIGN)
        for name in ("command", "words", "sums"):
            formal.assume_stream(m, getattr(walk, name), name)
        for name in ("fetch", "product", "region", "product_words", "row", "results"):
            m.d.comb += getattr(walk, name).ready.eq(formal.free(m, 1, f"{name}_ready"))
        for name in ("fetch", "results"):
            formal.assert_stream(m, getattr(walk, name), name)
        asked, summed, given = Signal(3), Signal(3), Signal(3)
        for count, stream in ((asked, walk.fetch), (summed, walk.sums), (given, walk.results)):
            with m.If(stream.valid & stream.ready):
                m.d.sync += count.eq(count + 1)
        with m.If(walk.product.valid & walk.product.ready):  # the walk begins
            m.d.sync += [count.eq(0) for count in (asked, summed, given)]
        due = walk.slack + walk.decided
        with m.If(walk.running):
            m.d.comb += Assert(due + (asked - summed)[:3] == walk.held.trees[:3])
        if not self.fault:
            m.d.comb += Assume(walk.sums.valid.implies(asked != summed))
        m.d.comb += [
            Assert(walk.ended.all() | walk.running),
            Assert(walk.asking.implies(~walk.ended[0] & (walk.slack != 0))),
            Assert(walk.fetch.valid.implies(walk.asking)),
            Assert((given + walk.results.valid)[:3] == summed),
            Assert(walk.results.valid.implies(walk.running)),
        ]
        return m


class Apart(Elaboratable):
    """A chunk's column is not that of any of the three cycles before."""

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.combine = combine = Combine(DESIGN)
        for name in ("command", "words"):
            formal.assume_stream(m, getattr(combine, name), name)
        for name in ("fetch", "row", "results"):
            stream = getattr(combine, name)
            m.d.comb += stream.ready.eq(formal.free(m, 1, f"{name}_ready"))
        history = [(combine.taken, combine.column)]
        for age in (1, 2, 3):
            taken, column = Signal(name=f"taken{age}"), Signal(2, name=f"column{age}")
            m.d.sync += [taken.eq(history[-1][0]), column.eq(history[-1][1])]
            history.append((taken, column))
            m.d.comb += Assert(~(combine.taken & taken & (combine.column == column)))
        return m


def test_each_visit_is_counted_once():
    formal.prove(Once(), depth=12, induction=False)
    holds, _ = formal.answer(Once(fault=True), depth=12, induction=False)
    assert not holds


def test_a_walk_is_in_step():
    formal.prove(Asked(), depth=3)
    holds, _ = formal.answer(Asked(fault=True), depth=3)
    assert not holds


def test_no_column_is_read_while_its_sum_is_on_the_way():
    formal.prove(Apart(), depth=6)
