"""Several readers of one memory: whole bursts in turn, answers back to who asked.

The turn goes to the next reader that waits, so one that waits sees each of the others served once
at most. Readers have room for what they ask (ports.MemoryPort), so no answer holds up another's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Array, Module, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


class Arbiter(wiring.Component):
    """`readers[i]` in, `memory` out. At most `outstanding` bursts are under way.

    A reader's `ready` depends on registers only: a request is passed on every second cycle.
    """

    def __init__(self, design: Design, readers: int, *, outstanding: int = 32) -> None:
        assert readers >= 1
        self.count, self.outstanding = readers, outstanding
        port = ports.MemoryPort(design.memory_bits)
        super().__init__({"readers": In(port).array(readers), "memory": Out(port)})
        self.turn = Signal(range(readers))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        turn = self.turn
        m.submodules.owners = owners = fifo.SyncFIFO(width=len(turn), depth=self.outstanding)
        request, answer = self.memory.request, self.memory.response
        room, put = Signal(), Signal()
        asks = Array(reader.request for reader in self.readers)[turn]
        m.d.comb += [
            room.eq(~request.valid & owners.w_rdy),
            put.eq(room & asks.valid),
            owners.w_data.eq(turn),
            owners.w_en.eq(put),
        ]
        with m.If(request.ready):
            m.d.sync += request.valid.eq(0)
        with m.If(put):
            m.d.sync += [request.valid.eq(1), request.payload.eq(asks.payload)]
        with m.If(put | ~asks.valid):
            self._pass_on(m)

        owner = Signal(range(self.count))
        m.d.comb += [
            owner.eq(owners.r_data),
            owners.r_en.eq(answer.valid & answer.ready & answer.payload.last),
        ]
        for i, reader in enumerate(self.readers):
            mine = owners.r_rdy & (owner == i)
            m.d.comb += [
                reader.request.ready.eq(room & (turn == i)),
                reader.response.payload.eq(answer.payload),
                reader.response.valid.eq(answer.valid & mine),
            ]
            with m.If(mine):
                m.d.comb += answer.ready.eq(reader.response.ready)
        return m

    def _pass_on(self, m: Module) -> None:
        """The turn goes to the nearest reader behind this one that waits."""
        for now in range(self.count):
            with m.If(self.turn == now):
                for step in reversed(range(1, self.count)):
                    other = (now + step) % self.count
                    with m.If(self.readers[other].request.valid):
                        m.d.sync += self.turn.eq(other)
