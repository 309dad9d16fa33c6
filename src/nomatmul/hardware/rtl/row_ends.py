"""The ends of the row unit: the writer into vector memory, and the way of logits to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.pipeline import delay, register

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


class Writer(wiring.Component):
    """Writes `value` to dst + element where `valid`, two cycles later; with `two` also `second`,
    given a cycle after value, to dst2 + element. `finished` goes with an element's last write."""

    def __init__(self, design: Design) -> None:
        self.design = design
        element = signed(design.vector_bits)
        super().__init__(
            {
                "valid": In(1),
                "value": In(element),
                "element": In(ports.ROW_BITS),
                "two": In(1),
                "second": In(element),
                "dst": In(ports.ELEMENT_BITS),
                "dst2": In(ports.ELEMENT_BITS),
                "write": Out(ports.vector_write(design)),
                "finished": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        again = register(m, self.valid & self.two, "again", reset=True)
        value = register(m, Mux(again, self.second, self.value), "value_1")
        base = register(m, Mux(again, self.dst2, self.dst), "base")
        element = Signal(ports.ROW_BITS, reset_less=True)
        with m.If(self.valid):
            m.d.sync += element.eq(self.element)
        valid = register(m, self.valid | again, "valid_1", reset=True)
        final = register(m, Mux(self.two, again, self.valid), "final", reset=True)
        address = (base + element)[: len(self.write.address)]
        m.d.comb += [
            self.write.valid.eq(register(m, valid, "write_valid", reset=True)),
            self.write.address.eq(register(m, address, "write_address")),
            self.write.data.eq(register(m, value, "write_data")),
            self.finished.eq(register(m, final, "finished_1", reset=True)),
        ]
        return m


class Logits(wiring.Component):
    """Logits into a queue for the host, and the largest of them since `restart`, the first of
    equals; a reset leaves it as it is. `taken`: the host took one. Who gives logits counts them, so
    that the queue has room."""

    def __init__(self, design: Design, depth: int) -> None:
        self.design = design
        self._depth = depth
        super().__init__(
            {
                "restart": In(1),
                "valid": In(1),
                "value": In(signed(design.vector_bits)),
                "last": In(1),
                "element": In(ports.ROW_BITS),
                "logits": Out(stream.Signature(ports.logit(design))),
                "argmax": Out(ports.argmax(design)),
                "taken": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = queue = fifo.SyncFIFOBuffered(
            width=len(self.value) + 1, depth=self._depth
        )
        m.d.comb += [
            queue.w_en.eq(self.valid),
            queue.w_data.eq(Cat(self.value, self.last)),
            self.logits.valid.eq(queue.r_rdy),
            self.logits.payload.eq(queue.r_data),
            queue.r_en.eq(self.logits.ready),
        ]
        m.d.sync += self.taken.eq(queue.r_rdy & self.logits.ready)

        self._largest(m)
        return m

    def _largest(self, m: Module) -> None:
        """The comparisons are registers: a logit is compared with the largest before the one in
        front of it and with that one, and which of the two counts is known a cycle later."""
        largest = Signal(ports.argmax(self.design), reset_less=True)
        m.d.comb += self.argmax.eq(largest)
        value, index = register(m, self.value, "value_1"), register(m, self.element, "index_1")
        valid = delay(m, self.valid, 2, "valid", reset=True)
        value_2, index_2 = register(m, value, "value_2"), register(m, index, "index_2")
        over_largest = register(m, value > largest.value, "over_largest")
        over_previous = register(m, value > value_2, "over_previous")
        first, replaces = Signal(), Signal()
        replaced = register(m, replaces, "replaced", reset=True)
        m.d.comb += replaces.eq(valid & (first | Mux(replaced, over_previous, over_largest)))
        with m.If(self.restart):
            m.d.sync += first.eq(1)
        with m.Elif(replaces):
            m.d.sync += first.eq(0)
        with m.If(replaces):
            m.d.sync += [largest.value.eq(value_2), largest.index.eq(index_2)]
