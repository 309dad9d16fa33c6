"""The loader: takes parameters, or a token's embedding, out of the stream.

A region of parameters is int16, E a write. An embedding's record is 8 bytes of scale (m int32, e
int32; a Scalar has 24 and 10 of their bits), then int8, which go as sums to the row unit, one a
cycle. Both come through one gearbox as pieces of 16 * E bits.
"""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.commands import LoadCommand
from nomatmul.hardware.rtl.gearbox import Gearbox

SCALE_BYTES = 8


class Loader(wiring.Component):
    """`busy` from the cycle after a command is taken until its last write or sum is handed on.
    `scale` comes once an embedding, before its `sums`.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "command": In(stream.Signature(LoadCommand)),
                "words": In(stream.Signature(ports.memory_word(design.memory_bits))),
                "parameter": Out(ports.parameter_write(design)),
                "scale": Out(stream.Signature(ports.Scalar)),
                "sums": Out(stream.Signature(ports.product_sum(design.sum_bits))),
                "busy": Out(1),
            }
        )
        self._command = Signal(LoadCommand)
        self._left = Signal(ports.ELEMENT_BITS)  # parameters, or int8, still to hand on
        self._held = Signal(16 * design.element_lanes)
        self._bytes = Signal(range(2 * design.element_lanes + 1))  # in `held`

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = self.design.element_lanes
        m.submodules.gearbox = gearbox = Gearbox(self.design.memory_bits, 16 * lanes)
        wiring.connect(m, wiring.flipped(self.words), gearbox.words)
        pieces = Signal(ports.ELEMENT_BITS)
        count, piece = self._command.count, gearbox.output
        m.d.comb += gearbox.command.payload.eq(pieces)
        m.d.sync += self.parameter.valid.eq(0)
        with m.If(self.sums.ready):
            m.d.sync += self.sums.valid.eq(0)
        with m.FSM(init="IDLE") as fsm:
            m.d.comb += self.busy.eq(~fsm.ongoing("IDLE"))
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                m.d.sync += self._command.eq(self.command.payload)
                with m.If(self.command.valid):
                    m.next = "COUNT"
            with m.State("COUNT"):
                embed = (count + SCALE_BYTES + 2 * lanes - 1) // (2 * lanes)
                m.d.sync += [
                    pieces.eq(Mux(self._command.embed, embed, (count + lanes - 1) // lanes)),
                    self._left.eq(count),
                    self.parameter.address.eq(self._command.dst // lanes - 1),
                ]
                m.next = "BEGIN"
            with m.State("BEGIN"):
                m.d.comb += gearbox.command.valid.eq(1)
                with m.If(gearbox.command.ready):
                    m.next = "PARAMETERS"
                    with m.If(self._command.embed):
                        m.next = "SCALE"
            with m.State("PARAMETERS"):
                m.d.comb += piece.ready.eq(1)
                with m.If(piece.valid):
                    self._write(m, piece.payload)
            with m.State("SCALE"):
                self._scale(m, piece)
            with m.State("BYTES"):
                self._hand_on(m, piece)
            # the write, or the sum, is on its way
            with m.State("LAST"), m.If(~self.sums.valid | self.sums.ready):
                m.next = "IDLE"
        return m

    def _write(self, m: Module, piece: Signal) -> None:
        lanes = self.design.element_lanes
        m.d.sync += [
            self.parameter.valid.eq(1),
            self.parameter.address.eq(self.parameter.address + 1),
            self.parameter.mask.eq(Cat(self._left > lane for lane in range(lanes))),
            self.parameter.data.eq(piece),
            self._left.eq(self._left - lanes),
        ]
        with m.If(self._left <= lanes):
            m.next = "LAST"

    def _scale(self, m: Module, piece: stream.Interface) -> None:
        m.d.comb += [
            self.scale.valid.eq(piece.valid),
            self.scale.payload.m.eq(piece.payload[:24]),
            self.scale.payload.e.eq(piece.payload[32:42]),
            piece.ready.eq(self.scale.ready),
        ]
        m.d.sync += [
            self._held.eq(piece.payload >> (8 * SCALE_BYTES)),
            self._bytes.eq(2 * self.design.element_lanes - SCALE_BYTES),
            self.sums.payload.row.eq(-1),
        ]
        with m.If(piece.valid & self.scale.ready):
            m.next = "BYTES"

    def _hand_on(self, m: Module, piece: stream.Interface) -> None:
        """One byte a cycle, out of a register; a new piece when there is none."""
        go = ~self.sums.valid | self.sums.ready
        with m.If(self._bytes == 0):
            m.d.comb += piece.ready.eq(1)
            m.d.sync += self._held.eq(piece.payload)
            with m.If(piece.valid):
                m.d.sync += self._bytes.eq(2 * self.design.element_lanes)
        with m.Elif(go):
            m.d.sync += [
                self.sums.valid.eq(1),
                self.sums.payload.sum.eq(self._held[:8].as_signed()),
                self.sums.payload.row.eq(self.sums.payload.row + 1),
                self.sums.payload.last.eq(self._left == 1),
                self._held.eq(self._held >> 8),
                self._bytes.eq(self._bytes - 1),
                self._left.eq(self._left - 1),
            ]
            with m.If(self._left == 1):
                m.next = "LAST"
