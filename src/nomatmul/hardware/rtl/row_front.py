"""The front of the row unit: takes a command, then its sums, each with its factor and its element.

Nothing behind the front ever waits, so its only flow control is to take no sum: not before the
factors are ready, not after the last, and of logits no more than the queue behind the pipeline
holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Array, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.pipeline import register
from nomatmul.hardware.rtl.rescale import Factor
from nomatmul.reference.integer.numerics import FACTOR_BITS, MANTISSA_BITS

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

IN_FLIGHT_BITS = 8
# Sums that can be taken before `in_flight` shows the first of them.
_UNSEEN = 3


def scaled_sum(sum_bits: int, shift_bits: int) -> data.StructLayout:
    """A sum with what `Rescale` needs. `final`: of the last slot, so that an element is whole;
    `last`: of the command."""
    return data.StructLayout(
        {
            "sum": signed(sum_bits),
            "factor": FACTOR_BITS,
            "shift": shift_bits,
            "beyond": 1,
            "slot": 2,
            "final": 1,
            "last": 1,
            "element": ports.ROW_BITS,
        }
    )


class RowFront(wiring.Component):
    """`held` is the command that runs (`started` pulses with its first cycle); `valid` and `scaled`
    go to the pipeline, which gives a `finished` for each final sum. With `limited`, at most `limit`
    elements are in flight. What is not in the signature is shown for proofs: sums still to come
    (`left`), what is known of them, and where the command is."""

    def __init__(self, design: Design, shift_bits: int, limit: int) -> None:
        self.design = design
        self._limit = limit
        self._shift_bits = shift_bits
        self.left, self.one_left = Signal(ports.ROW_BITS, reset_less=True), Signal(reset_less=True)
        self.taking, self.draining = Signal(), Signal()
        self.in_flight = Signal(IN_FLIGHT_BITS)
        super().__init__(
            {
                "command": In(stream.Signature(ports.RowCommand)),
                "sums": In(stream.Signature(ports.product_sum(design.sum_bits))),
                "held": Out(ports.RowCommand),
                "started": Out(1),
                "busy": Out(1),
                "valid": Out(1),
                "scaled": Out(scaled_sum(design.sum_bits, shift_bits)),
                "finished": In(1),
                "limited": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        fire, in_flight = Signal(), self.in_flight
        m.d.comb += fire.eq(self.sums.valid & self.sums.ready)
        taken = register(m, fire, "taken", reset=True)
        final = self._scaled(m, fire, taken)
        m.d.sync += in_flight.eq(in_flight + (taken & final) - self.finished)
        drained = (in_flight == 0) & ~taken
        room = ~self.limited | (in_flight <= self._limit - _UNSEEN)
        self._control(m, fire, room, drained)
        return m

    def _scaled(self, m: Module, fire: Signal, taken: Signal) -> Signal:
        """Two registers: the sum as it came, then with its factor; gives `final` of the first."""
        held = self.held
        out = Signal(self.scaled.shape(), reset_less=True)
        m.d.comb += self.scaled.eq(out)
        came = Signal(self.sums.payload.shape(), reset_less=True)
        last, final = Signal(reset_less=True), Signal()
        element = Signal(ports.ROW_BITS, reset_less=True)
        with m.If(fire):
            m.d.sync += [came.eq(self.sums.payload), last.eq(self.one_left)]
        # A product counts rows over all slots; elements of pairs and triples are counted here.
        m.d.comb += final.eq(came.slot + 1 == held.slots)
        with m.If(self.started):
            m.d.sync += element.eq(0)
        with m.Elif(taken & final):
            m.d.sync += element.eq(element + 1)

        shifts, beyonds, factors = [], [], []
        for slot, scalar in enumerate(held.scalars):
            m.submodules[f"factor{slot}"] = factor = Factor(
                self.design.vector_bits, self._shift_bits, ports.FRACTION_BITS
            )
            m.d.comb += [factor.e.eq(scalar.e), factor.fraction.eq(held.fraction)]
            shifts.append(factor.shift)
            beyonds.append(factor.beyond)
            factors.append(scalar.m[MANTISSA_BITS - FACTOR_BITS :])
        m.d.sync += [
            self.valid.eq(taken),
            out.sum.eq(came.sum),
            out.factor.eq(Array(factors)[came.slot]),
            out.shift.eq(Array(shifts)[came.slot]),
            out.beyond.eq(Array(beyonds)[came.slot]),
            out.slot.eq(came.slot),
            out.final.eq(final),
            out.last.eq(last),
            out.element.eq(Mux(held.slots == 1, came.row, element)),
        ]
        return final

    def _control(self, m: Module, fire: Signal, room: Signal, drained: Signal) -> None:
        left, one_left = self.left, self.one_left
        held = Signal(ports.RowCommand, reset_less=True)
        m.d.comb += self.held.eq(held)
        with m.If(fire):
            m.d.sync += [left.eq(left - 1), one_left.eq(left == 2)]
        m.d.sync += [self.sums.ready.eq(0), self.started.eq(0)]
        m.d.comb += self.busy.eq(1)
        with m.FSM() as fsm:
            m.d.comb += [
                self.taking.eq(fsm.ongoing("TAKE")),
                self.draining.eq(fsm.ongoing("DRAIN")),
            ]
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(0), self.command.ready.eq(1)]
                with m.If(self.command.valid):
                    m.d.sync += [held.eq(self.command.payload), self.started.eq(1)]
                    m.next = "COUNT"
            with m.State("COUNT"):
                m.d.sync += [left.eq(held.rows), one_left.eq(held.rows == 1)]
                m.next = "BEGIN"
            with m.State("BEGIN"):
                m.next = "TAKE"
                with m.If(left == 0):
                    m.next = "DRAIN"
            with m.State("TAKE"):  # the first sum comes when the factors are there
                m.d.sync += self.sums.ready.eq(room)
                with m.If(fire & one_left):
                    m.d.sync += self.sums.ready.eq(0)
                    m.next = "DRAIN"
            with m.State("DRAIN"), m.If(drained):
                m.next = "IDLE"
