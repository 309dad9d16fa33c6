"""A first-in first-out queue in block RAM whose output comes from registers.

Block RAM answers late in a cycle, so its word passes one more register before it is seen. A word
that goes in is at the output three cycles later; then one word a cycle goes in and out. For a few
words use `amaranth.lib.fifo.SyncFIFO`, which lies in LUTs.
"""

from __future__ import annotations

from typing import Any

from amaranth import Cat, Module, Shape, Signal, Value
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out

PART = 144  # bits of the output that have a signal of their own: of four block RAMs of 36


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
        # of each part of the output: fetched and output.valid once more
        self.parts = [
            (Signal(attrs={"keep": 1}), Signal(attrs={"keep": 1}))
            for _ in range(0, Shape.cast(shape).width, PART)
        ]

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
        ready = self.output.ready
        m.d.comb += [
            self.input.ready.eq(~stored[-1]),
            put.eq(self.input.valid & self.input.ready),
            take.eq(self.output.valid & ready),
            shift.eq(fetched & (~self.output.valid | ready)),
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
        self._output(m, Value.cast(read.data), fetch, shift, take)
        return m

    def _output(self, m: Module, word: Value, fetch: Value, shift: Value, take: Value) -> None:
        """The output's registers, in parts that each know by themselves when to load."""
        parts = []
        for k, (fetched, valid) in enumerate(self.parts):
            here = word[k * PART : (k + 1) * PART]
            part = Signal(len(here), reset_less=True)
            m.d.sync += [
                fetched.eq(fetch | (fetched & ~shift)),
                valid.eq(shift | (valid & ~take)),
            ]
            with m.If(fetched & (~valid | self.output.ready)):
                m.d.sync += part.eq(here)
            parts.append(part)
        m.d.comb += Value.cast(self.output.payload).eq(Cat(parts))
