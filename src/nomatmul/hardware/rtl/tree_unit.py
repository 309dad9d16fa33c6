"""The unit of ternary trees: WALK and COMBINE, and the list of visited rows between them.

A token visits one node a level of each tree, so only those records are read from memory: `walk`
fetches rows of w_in one decision at a time, `combine` the rows of w_out of the same visits. Only
one of them runs at a time; while `busy` the top gives the unit the product unit, the row unit and
the row fetcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amaranth import Module, Mux, unsigned
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nomatmul.hardware.design import TREE_ROW_BITS as ROW_BITS
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.combine import Combine
from nomatmul.hardware.rtl.gearbox import COUNT_BITS
from nomatmul.hardware.rtl.walk import NO_CHECK, Walk

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


class TreeUnit(wiring.Component):
    """`walk` and `combine` take commands when not busy; the other ports as `Walk` and `Combine`.

    `memory_error`, `illegal` and `refused` are pulses.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        word = ports.memory_word(design.memory_bits)
        sums = ports.product_sum(design.sum_bits)
        super().__init__(
            {
                "walk": In(stream.Signature(ports.WalkCommand)),
                "combine": In(stream.Signature(ports.CombineCommand)),
                "fetch": Out(stream.Signature(ports.ReadCommand)),
                "words": In(stream.Signature(word)),
                "product": Out(stream.Signature(ports.ProductCommand)),
                "region": Out(stream.Signature(unsigned(COUNT_BITS))),
                "product_words": Out(stream.Signature(word)),
                "sums": In(stream.Signature(sums)),
                "row": Out(stream.Signature(ports.RowCommand)),
                "results": Out(stream.Signature(sums)),
                "parameter": Out(ports.parameter_write(design)),
                "activation": In(ports.ActivationWrite(design)),
                "busy": Out(1),
                "memory_error": Out(1),
                "illegal": Out(1),
                "refused": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.walker = walk = Walk(self.design)
        m.submodules.combiner = combine = Combine(self.design)
        m.submodules.visits = visits = memory.Memory(
            shape=ROW_BITS, depth=self.design.tree_rows, init=[], attrs=NO_CHECK
        )
        write, read = visits.write_port(), visits.read_port()
        self._command(m, self.walk, walk.command)
        self._command(m, self.combine, combine.command)
        for name in ("product", "region", "product_words", "sums", "parameter"):
            connect(m, flipped(getattr(self, name)), getattr(walk, name))
        connect(m, flipped(self.activation), combine.activation)
        m.d.comb += [
            write.en.eq(walk.visit.valid),
            write.addr.eq(walk.visit.address),
            write.data.eq(walk.visit.data),
            read.en.eq(combine.visits.enable),
            read.addr.eq(combine.visits.address),
            combine.visits.data[0].eq(read.data),
            self.busy.eq(walk.busy | combine.busy),
            self.memory_error.eq(walk.memory_error | combine.memory_error),
            self.illegal.eq(combine.illegal),
            self.refused.eq(walk.refused | combine.refused),
        ]
        for name in ("fetch", "row", "results"):
            self._select(m, getattr(self, name), getattr(walk, name), getattr(combine, name))
        words = self.words
        m.d.comb += [walk.words.payload.eq(words.payload), combine.words.payload.eq(words.payload)]
        with m.If(combine.busy):
            m.d.comb += [combine.words.valid.eq(words.valid), words.ready.eq(combine.words.ready)]
        with m.Else():
            m.d.comb += [walk.words.valid.eq(words.valid), words.ready.eq(walk.words.ready)]
        return m

    def _command(self, m: Module, mine: Any, theirs: Any) -> None:
        """A command is taken when neither runs."""
        m.d.comb += [
            theirs.payload.eq(mine.payload),
            theirs.valid.eq(mine.valid & ~self.busy),
            mine.ready.eq(theirs.ready & ~self.busy),
        ]

    @staticmethod
    def _select(m: Module, out: Any, walk: Any, combine: Any) -> None:
        """The stream of whichever is valid: never both, as only one runs."""
        m.d.comb += [
            out.valid.eq(walk.valid | combine.valid),
            out.payload.eq(Mux(combine.valid, combine.payload, walk.payload)),
            walk.ready.eq(out.ready),
            combine.ready.eq(out.ready),
        ]
