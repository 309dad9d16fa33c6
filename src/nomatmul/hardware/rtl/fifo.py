"""A first-in first-out queue in block RAM whose output comes from registers.

Block RAM answers late in a cycle, so its word passes one more register before it is seen. A word
that goes in is at the output three cycles later; then one word a cycle goes in and out. For a few
words use `amaranth.lib.fifo.SyncFIFO`, which lies in LUTs.
"""

from __future__ import annotations

from typing import Any

from amaranth import Module, Signal
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out


class Fifo(wiring.Component):
    """`input` to `output` through a memory of `depth` words, a power of two; two more fit behind.

    `level`: words inside. `input.ready` depends on registers only.
    """

    def __init__(self, shape: Any, depth: int) -> None:
        assert depth >= 2
        assert depth & (depth - 1) == 0, depth
        self.shape, self.depth = shape, depth
        super().__init__(
            {
                "input": In(stream.Signature(shape)),
                "output": Out(stream.Signature(shape)),
                "level": Out(range(depth + 3)),
            }
        )
        self.stored = Signal(range(depth + 1))  # words in the memory that were not read yet
        self.fetched = Signal()  # the memory's own output holds a word

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # no_rw_check: a word is never read in the cycle in which it is written
        attrs = {"no_rw_check": 1}
        m.submodules.words = words = memory.Memory(
            shape=self.shape, depth=self.depth, init=[], attrs=attrs
        )
        write, read = words.write_port(), words.read_port()
        stored, fetched = self.stored, self.fetched
        put, fetch, shift, take = (Signal(name=name) for name in ("put", "fetch", "shift", "take"))
        m.d.comb += [
            self.input.ready.eq(~stored[-1]),
            put.eq(self.input.valid & self.input.ready),
            take.eq(self.output.valid & self.output.ready),
            shift.eq(fetched & (~self.output.valid | self.output.ready)),
            fetch.eq((stored != 0) & (~fetched | shift)),
            write.en.eq(put),
            write.data.eq(self.input.payload),
            read.en.eq(fetch),
        ]
        m.d.sync += [
            stored.eq(stored + put - fetch),
            self.level.eq(self.level + put - take),
            fetched.eq(fetch | (fetched & ~shift)),
            self.output.valid.eq(shift | (self.output.valid & ~take)),
        ]
        with m.If(put):
            m.d.sync += write.addr.eq(write.addr + 1)
        with m.If(fetch):
            m.d.sync += read.addr.eq(read.addr + 1)
        with m.If(shift):
            m.d.sync += self.output.payload.eq(read.data)
        return m
