"""The guard of the memory port: a soft reset must not leave answers that nobody asked for.

It counts the words that are due. A reset holds the units (`hold`) and drops what comes until none
are; then the units start as new, and every later answer is theirs.
"""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports

_DUE_BITS = 20
_LEAST = 31  # cycles of a reset: the units get it one after the other


class Guard(wiring.Component):
    """`units` in, `memory` out. `reset` pulses; `hold` is high from the next cycle until all words
    due have come. `word` and `error` pulse for a word that came, and for one with an error.
    """

    def __init__(self, design: Design) -> None:
        port = ports.MemoryPort(design.memory_bits)
        super().__init__(
            {
                "units": In(port),
                "memory": Out(port),
                "reset": In(1),
                "hold": Out(1),
                "word": Out(1),
                "error": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        ask, asked = self.units.request, self.memory.request
        answer, answered = self.memory.response, self.units.response
        due = Signal(_DUE_BITS)
        put, come, least = Signal(), Signal(), Signal(range(_LEAST + 1))
        m.d.comb += [
            # of registers only: memory's own ready is late in its cycle
            ask.ready.eq(~asked.valid & ~self.hold),
            put.eq(ask.valid & ask.ready),
            answered.payload.eq(answer.payload),
            answered.valid.eq(answer.valid & ~self.hold),
            answer.ready.eq(answered.ready | self.hold),
            come.eq(answer.valid & answer.ready),
        ]
        with m.If(asked.ready):
            m.d.sync += asked.valid.eq(0)
        with m.If(put):
            m.d.sync += [asked.valid.eq(1), asked.payload.eq(ask.payload)]
        m.d.sync += [
            due.eq(due + Mux(put, ask.payload.length, 0) - self.word),
            self.word.eq(come),
            self.error.eq(come & answer.payload.error),
            least.eq(Mux(self.hold, least + (least != _LEAST), 0)),
        ]
        with m.If(self.reset):
            m.d.sync += self.hold.eq(1)
        with m.Elif(self.hold & (least == _LEAST) & (due == 0) & ~asked.valid):
            m.d.sync += self.hold.eq(0)
        return m
