"""Readers of memory: a command of an address and a number of words becomes bursts and a stream.

A burst is asked for only when its words have room in the FIFO (`credits`), so an answer never
waits. No burst crosses a multiple of `burst` words, which is what AXI and SDRAM rows ask for.

The weights of a token come through one Streamer, which reads ahead as far as its FIFO is deep. The
rows that a tree visits come through a RowFetcher, the same with a shallow FIFO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.fifo import Fifo

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


class Streamer(wiring.Component):
    """`command` in, `words` out in order; the next command may come while words are due.

    `level`: words that wait in the FIFO. `error` pulses for a word that memory answers with an
    error; such a word is passed on. `busy`: words are still to be asked for, to come or to be
    taken. A command of 0 words does nothing. A burst is asked for every third cycle at most.
    """

    def __init__(self, design: Design, fifo_words: int | None = None) -> None:
        self.memory_bits, self.burst = design.memory_bits, design.burst
        self.depth = design.fifo_words if fifo_words is None else fifo_words
        assert self.depth >= 2 * self.burst
        super().__init__(
            {
                "command": In(stream.Signature(ports.ReadCommand)),
                "memory": Out(ports.MemoryPort(self.memory_bits)),
                "words": Out(stream.Signature(ports.memory_word(self.memory_bits))),
                "level": Out(range(self.depth + 3)),
                "error": Out(1),
                "busy": Out(1),
            }
        )
        self.credits = Signal(range(self.depth + 1), init=self.depth)
        # what changes credits, a cycle late: bursts are three cycles apart at least
        self.cost, self.taken = Signal(range(self.burst + 1)), Signal()
        self.asking = Signal()  # bursts are still to be asked for
        self.compared = Signal()  # ... and it is known whether the rest ends in the next one
        self.measured = Signal()  # ... and the next one's length is found
        self.inside = Signal(range(self.burst + 1))  # words until the next multiple of burst
        self.length = Signal(range(self.burst + 1))
        self.final = Signal()  # it is the command's last
        self.left = Signal(ports.WORD_ADDRESS_BITS)  # words to ask for
        self.address = Signal(ports.WORD_ADDRESS_BITS)  # of the first of them
        self.fifo = Fifo(ports.memory_word(self.memory_bits), self.depth)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.fifo = fifo = self.fifo
        credits, asked = self.credits, self.memory.request.valid
        self._bursts(m)
        answer = self.memory.response
        m.d.comb += [
            fifo.input.valid.eq(answer.valid),
            fifo.input.payload.data.eq(answer.payload.data),
            fifo.input.payload.error.eq(answer.payload.error),
            answer.ready.eq(fifo.input.ready),
            self.words.valid.eq(fifo.output.valid),
            self.words.payload.eq(fifo.output.payload),
            fifo.output.ready.eq(self.words.ready),
            self.level.eq(fifo.level),
            self.busy.eq(self.asking | asked | (credits != self.depth)),
        ]
        m.d.sync += [
            self.taken.eq(self.words.valid & self.words.ready),
            credits.eq(credits - self.cost + self.taken),
            self.error.eq(answer.valid & answer.ready & answer.payload.error),
        ]
        return m

    def _bursts(self, m: Module) -> None:
        """Ask for bursts: what is left is compared with a burst (`compared`), then a burst's length
        is found (`measured`), then it is put out.
        """
        request, low = self.memory.request, (self.burst - 1).bit_length()
        asking, measured, length, left = self.asking, self.measured, self.length, self.left
        address, final = self.address, self.final
        inside, compared = Signal(range(self.burst + 1)), self.compared
        put, room = Signal(), Signal()
        m.d.comb += [
            self.command.ready.eq(~asking),
            inside.eq(self.burst - address[:low]),
            room.eq(self.credits[low:].any()),  # burst is a power of two
            put.eq(measured & room & (~request.valid | request.ready)),
        ]
        m.d.sync += self.cost.eq(Mux(put, length, 0))
        with m.If(request.ready):
            m.d.sync += request.valid.eq(0)
        with m.If(asking & ~measured & ~compared):
            m.d.sync += [compared.eq(1), final.eq(left <= inside), self.inside.eq(inside)]
        with m.If(compared):
            m.d.sync += [
                compared.eq(0),
                measured.eq(1),
                length.eq(Mux(final, left, self.inside)),
            ]
        with m.If(put):
            m.d.sync += [
                measured.eq(0),
                asking.eq(~final),
                request.valid.eq(1),
                request.payload.address.eq(address),
                request.payload.length.eq(length),
                address.eq(address + length),
                left.eq(left - length),
            ]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [
                asking.eq(self.command.payload.words != 0),
                address.eq(self.command.payload.address),
                left.eq(self.command.payload.words),
            ]
