"""Proofs about the row unit's front and ends: no sum is lost or doubled, no queue runs over.

The front stands between a source of sums and a pipeline that finishes elements whenever it likes,
but none that it was not given. By induction, so for commands of any length and for ever.
"""

from __future__ import annotations

from typing import Any

from amaranth import Module, Mux, Signal, signed
from amaranth.hdl import Assert, Assume
from amaranth.lib.wiring import Component

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.row_ends import Logits
from nomatmul.hardware.rtl.row_front import RowFront
from tests.hardware import formal

SMALL = Design(lanes=32, vector_bits=16, vector_fraction=8, state_bits=16, state_fraction=8)
LIMIT = 8
PIPELINE = 100  # elements that the pipeline can hold, where nothing limits them


class Front(Component):
    """Every command takes exactly its rows, and ends when the pipeline is empty, not before."""

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__({})
        self._limit = limit

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.front = front = RowFront(SMALL, 6, self._limit)
        formal.assume_stream(m, front.command, "command")
        command, slots = front.command.payload, front.held.slots
        slot, fires = Signal(2), Signal(ports.ROW_BITS)
        given, out = Signal(8), Signal(8)
        limited = Signal()
        m.d.comb += [
            Assume((command.slots >= 1) & (command.slots <= 3)),
            front.sums.valid.eq(formal.free(m, 1, "sum")),
            front.sums.payload.slot.eq(slot),
            front.finished.eq(formal.free(m, 1, "finished")),
            front.limited.eq(limited),
        ]
        fire = front.sums.valid & front.sums.ready
        final = slot + 1 == slots
        begins = front.command.valid & front.command.ready
        with m.If(begins):
            m.d.sync += [fires.eq(0), slot.eq(0), limited.eq(formal.free(m, 1, "kind"))]
        with m.If(fire):
            m.d.sync += [fires.eq(fires + 1), slot.eq(Mux(final, 0, slot + 1))]
        # out: elements in the pipeline and on their way there; given: those inside it
        leaves = front.valid & front.scaled.final
        m.d.sync += [
            out.eq(out + (fire & final) - front.finished),
            given.eq(given + leaves - front.finished),
        ]
        came, counted = Signal(), Signal()
        m.d.sync += [came.eq(fire & final), counted.eq(came)]
        m.d.comb += [
            Assume(~front.finished | (given != 0)),
            Assume(limited | (out <= PIPELINE)),
            # what the proof rests on
            Assert(out == front.in_flight + came),
            Assert(out == given + came + counted),
            Assert(leaves == counted),
            Assert(~front.sums.ready | front.taking),
            Assert(~front.draining | (fires == front.held.rows)),
        ]
        with m.If(front.taking):
            m.d.comb += [
                Assert(slot < slots),
                Assert(front.left != 0),
                Assert(fires + front.left == front.held.rows),
                Assert(front.one_left == (front.left == 1)),
            ]
        m.d.comb += [
            # what it is about
            Assert(out <= Mux(limited, self._limit, PIPELINE + 3)),
        ]
        was_busy = Signal()
        m.d.sync += was_busy.eq(front.busy)
        with m.If(~front.busy):
            m.d.comb += [Assert(out == 0), Assert(~was_busy | (fires == front.held.rows))]
        return m


class Queue(Component):
    """With room for what comes, each logit leaves as it came, and in order."""

    def __init__(self) -> None:
        super().__init__({})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.logits = logits = Logits(SMALL, LIMIT)
        which, value = formal.watched(m, 4, "which"), formal.watched(m, signed(16), "value")
        came, left = Signal(4), Signal(4)
        m.d.comb += [
            logits.valid.eq(formal.free(m, 1, "valid")),
            logits.value.eq(formal.free(m, signed(16), "logit")),
            logits.logits.ready.eq(formal.free(m, 1, "host")),
            Assume(~logits.valid | ((came - left)[:4] < LIMIT)),
            Assume(~logits.valid | (came != which) | (logits.value == value)),
        ]
        taken = logits.logits.valid & logits.logits.ready
        m.d.sync += [came.eq(came + logits.valid), left.eq(left + taken)]
        m.d.comb += Assert(~taken | (came != left))
        with m.If(taken & (left == which)):
            m.d.comb += Assert(logits.logits.payload.value == value)
        formal.assert_stream(m, logits.logits, "logits")
        return m


def test_front_takes_each_sum_once_and_waits_for_all() -> None:
    formal.prove(Front(), depth=8)


@formal.depths(10, 14)
def test_logits_leave_in_order(depth: int) -> None:
    formal.prove(Queue(), depth=depth, induction=False)
