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
from nomatmul.hardware.rtl.pipeline import Skid

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
        # no resets: what these hold counts in states that set them first
        self._command = Signal(LoadCommand, reset_less=True)
        self._left = Signal(ports.ELEMENT_BITS, reset_less=True)  # still to hand on
        self._final = Signal(reset_less=True)  # these are handed on at once
        self._empty = Signal(reset_less=True)  # no bytes in `held`
        self._held = Signal(16 * design.element_lanes, reset_less=True)
        self._at = Signal(range(2 * design.element_lanes), reset_less=True)  # byte of the piece
        self._group = Signal.like(self.parameter.address, reset_less=True)
        self._mask = Signal.like(self.parameter.mask, reset_less=True)
        self._data = Signal(16 * design.element_lanes, reset_less=True)
        self._scale_found = Signal(ports.Scalar, reset_less=True)
        self._sum = Signal(ports.product_sum(design.sum_bits), reset_less=True)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = self.design.element_lanes
        m.submodules.gearbox = gearbox = Gearbox(self.design.memory_bits, 16 * lanes, ahead=False)
        wiring.connect(m, wiring.flipped(self.words), gearbox.words)
        pieces = Signal(ports.ELEMENT_BITS, reset_less=True)
        # what comes behind is decided late in a cycle, and all readers of memory wait for it
        m.submodules.pieces = skid = Skid(16 * lanes)
        wiring.connect(m, gearbox.output, skid.input)
        count, piece = self._command.count, skid.output
        m.d.comb += gearbox.command.payload.eq(pieces)
        m.d.comb += [
            self.parameter.address.eq(self._group),
            self.parameter.mask.eq(self._mask),
            self.parameter.data.eq(self._data),
            self.sums.payload.eq(self._sum),
            self.scale.payload.eq(self._scale_found),
        ]
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
                    self._final.eq(count <= Mux(self._command.embed, 1, lanes)),
                    self._group.eq(self._command.dst // lanes - 1),
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
            with m.State("GIVE"):
                m.d.comb += self.scale.valid.eq(1)
                with m.If(self.scale.ready):
                    m.next = "BYTES"
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
            self._group.eq(self._group + 1),
            self._mask.eq(Cat(self._left > lane for lane in range(lanes))),
            self._data.eq(piece),
            self._left.eq(self._left - lanes),
            self._final.eq(self._left <= 2 * lanes),
        ]
        with m.If(self._final):
            m.next = "LAST"

    def _scale(self, m: Module, piece: stream.Interface) -> None:
        m.d.comb += piece.ready.eq(1)
        m.d.sync += [
            self._scale_found.m.eq(piece.payload[:24]),
            self._scale_found.e.eq(piece.payload[32:42]),
            self._held.eq(piece.payload.rotate_right(8 * SCALE_BYTES)),
            self._at.eq(SCALE_BYTES % (2 * self.design.element_lanes)),
            self._empty.eq(2 * self.design.element_lanes == SCALE_BYTES),
            self._sum.row.eq(-1),
        ]
        with m.If(piece.valid):
            m.next = "GIVE"

    def _hand_on(self, m: Module, piece: stream.Interface) -> None:
        """One byte a cycle, out of a register; a new piece when there is none."""
        go = ~self.sums.valid | self.sums.ready
        with m.If(self._empty):
            m.d.comb += piece.ready.eq(1)
            m.d.sync += self._held.eq(piece.payload)
            with m.If(piece.valid):
                m.d.sync += self._empty.eq(0)
        with m.Elif(go):
            m.d.sync += [
                self.sums.valid.eq(1),
                self._sum.sum.eq(self._held[:8].as_signed()),
                self._sum.row.eq(self._sum.row + 1),
                self._sum.last.eq(self._final),
                self._held.eq(self._held.rotate_right(8)),  # no zeros: they would be resets
                self._at.eq(self._at + 1),  # the number of bytes is a power of two
                self._empty.eq(self._at.all()),
                self._left.eq(self._left - 1),
                self._final.eq(self._left == 2),
            ]
            with m.If(self._final):
                m.next = "LAST"
