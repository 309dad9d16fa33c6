"""The row unit: what becomes of a product's sums on their way into vector memory.

One sum a cycle comes in; it is rescaled (y), and then stored, added to the residual, led through
the gates of an MLGRU or a GLU, through silu, or out to the host as a logit
(docs/hardware-numerics.md). It is one pipeline that never stops:

    front -> rescale -> y -+------------------------------------------------> store, logits
                           +-> read x, add ---------------------------------> add
                           +-> silu -+--------------------------------------> silu
                                     +-> pairs: silu(gate) * up ------------> glu
                                     +-> triples: next h -> silu, * g ------> mlgru: u, then g

Only one command runs at a time, so that paths of different length meet at the writer without
colliding. A triple writes two elements, u and a cycle later g, and takes three cycles to come in.
Elements of one command are different ones: nothing in the pipeline reads what it still has to
write, as long as aux = dst or the two ranges are apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from amaranth import Cat, Module, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.gates import READ_LATENCY, Gates, read_element
from nomatmul.hardware.rtl.pipeline import InOrder, delay, register
from nomatmul.hardware.rtl.ports import Epilogue
from nomatmul.hardware.rtl.recurrence import clamped
from nomatmul.hardware.rtl.rescale import Rescale
from nomatmul.hardware.rtl.row_ends import Logits, Writer
from nomatmul.hardware.rtl.row_front import RowFront

# Causes of saturation, in the order of `saturated` and `saturations`.
CAUSES = ("rescale", "residual", "state", "product")
COUNT_BITS = 16

# Logits that wait for the host; more than the pipeline is long, so that a ready host gets one a
# cycle.
LOGITS_DEPTH = 32
# Elements between y and their write, at most: an MLGRU's pipeline is the longest, a third as full.
_WAITING = 32

_Kinds = dict[Epilogue, Signal]


@dataclass(frozen=True)
class _Y:
    """A rescaled sum and what goes with it."""

    valid: Signal
    value: Signal
    slot: Signal
    final: Signal
    last: Signal
    element: Signal


class RowUnit(wiring.Component):
    """Rescale, epilogue, write. Ports:

    `command`: taken when idle; `sums`: exactly command.rows of them follow. `busy` is high from the
    cycle after a command is taken until all its writes are in memory (logits: until the last one is
    taken). `argmax` holds the largest logit of the last LOGITS command (the first of equals).
    `saturated` pulses a bit a cause, `saturations` counts them since reset (and stays at its
    maximum). `state_write` shows the writes of the state memory inside, for probes.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "command": In(stream.Signature(ports.RowCommand)),
                "sums": In(stream.Signature(ports.product_sum(design.sum_bits))),
                "busy": Out(1),
                "vector_read": Out(ports.vector_read(design)),
                "vector_write": Out(ports.vector_write(design)),
                "parameter_read": Out(ports.parameter_read(design)),
                "logits": Out(stream.Signature(ports.logit(design))),
                "argmax": Out(ports.argmax(design)),
                "state_write": Out(
                    ports.ElementWrite(design.state_words, signed(design.state_bits))
                ),
                "saturated": Out(len(CAUSES)),
                "saturations": Out(data.ArrayLayout(COUNT_BITS, len(CAUSES))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.rescale = rescale = Rescale(self.design.sum_bits, self.design.vector_bits)
        m.submodules.front = front = RowFront(self.design, rescale.shift_bits, LOGITS_DEPTH)
        m.submodules.gates = gates = Gates(self.design)
        m.submodules.writer = writer = Writer(self.design)
        m.submodules.logits = logits = Logits(self.design, LOGITS_DEPTH)
        m.submodules.waiting = waiting = InOrder(ports.ROW_BITS, _WAITING)
        connect(m, flipped(self.command), front.command)
        connect(m, flipped(self.sums), front.sums)
        held = front.held
        is_ = {
            kind: register(m, held.epilogue == kind, f"is_{kind.name.lower()}") for kind in Epilogue
        }
        y = self._rescaled(m, front, rescale)
        self._gate(m, gates, held, is_, y)
        added, added_valid, added_cut = self._added(m, held, is_, y)

        # From here on the element is the head of `waiting`.
        whole = register(m, y.valid & y.final, "whole", reset=True)
        value = register(m, y.value, "value")
        self._give(m, logits, is_, whole, value, register(m, y.last, "last"))
        self._write(
            m,
            writer,
            held,
            gates,
            is_,
            [
                (is_[Epilogue.STORE], whole, value),
                (is_[Epilogue.ADD], added_valid, added),
                (is_[Epilogue.SILU], gates.silu_valid, gates.silu),
                (is_[Epilogue.GLU] | is_[Epilogue.MLGRU], gates.u_valid, gates.u),
            ],
        )
        m.d.comb += [
            waiting.push.eq(y.valid & y.final),
            waiting.value.eq(y.element),
            waiting.pop.eq(writer.valid | logits.valid),
            writer.element.eq(waiting.head),
            logits.element.eq(waiting.head),
            logits.restart.eq(front.started & (held.epilogue == Epilogue.LOGITS)),
            front.limited.eq(is_[Epilogue.LOGITS]),
            front.finished.eq(writer.finished | logits.taken),
            self.busy.eq(front.busy),
        ]
        causes = {
            "rescale": y.valid & rescale.saturated,
            "residual": added_valid & added_cut,
            "state": gates.state_saturated,
            "product": gates.product_saturated,
        }
        m.d.sync += self.saturated.eq(Cat(causes[cause] for cause in CAUSES))
        for pulse, count in zip(self.saturated, self.saturations, strict=True):
            with m.If(pulse & ~count.all()):
                m.d.sync += count.eq(count + 1)
        return m

    def _rescaled(self, m: Module, front: RowFront, rescale: Rescale) -> _Y:
        scaled, cycles = front.scaled, rescale.latency
        m.d.comb += [
            rescale.sum.eq(scaled.sum),
            rescale.factor.eq(scaled.factor),
            rescale.shift.eq(scaled.shift),
            rescale.beyond.eq(scaled.beyond),
        ]
        return _Y(
            valid=delay(m, front.valid, cycles, "y_valid", reset=True),
            value=rescale.result,
            slot=delay(m, scaled.slot, cycles, "y_slot"),
            final=delay(m, scaled.final, cycles, "y_final"),
            last=delay(m, scaled.last, cycles, "y_last"),
            element=delay(m, scaled.element, cycles, "y_element"),
        )

    def _gate(self, m: Module, gates: Gates, held: Any, is_: _Kinds, y: _Y) -> None:
        # A command is done before its sums would have left a longer path than its own: they must
        # not come out of there in the next command.
        gated = is_[Epilogue.MLGRU] | is_[Epilogue.GLU] | is_[Epilogue.SILU]
        m.d.comb += [
            gates.valid.eq(y.valid & gated),
            gates.y.eq(y.value),
            gates.slot.eq(y.slot),
            gates.final.eq(y.final),
            gates.element.eq(y.element),
            gates.is_mlgru.eq(is_[Epilogue.MLGRU]),
            gates.is_glu.eq(is_[Epilogue.GLU]),
            gates.aux.eq(held.aux),
            gates.lb.eq(held.lb),
            gates.bounded.eq(held.bounded),
            gates.fresh.eq(held.fresh),
            gates.u_shift.eq(held.u_shift),
            self.state_write.valid.eq(gates.state_write.valid),
            self.state_write.address.eq(gates.state_write.address),
            self.state_write.data.eq(gates.state_write.data),
        ]
        connect(m, gates.parameter_read, flipped(self.parameter_read))

    def _added(self, m: Module, held: Any, is_: _Kinds, y: _Y) -> tuple[Signal, Signal, Signal]:
        """(x + y, whether it is there, whether it was saturated)."""
        adds = y.valid & y.final & is_[Epilogue.ADD]
        x = read_element(m, self.vector_read, held.aux + y.element, adds, "x")
        late = delay(m, y.value, READ_LATENCY, "y_late")
        total, cut = clamped(register(m, x + late, "total"), self.design.vector_bits)
        valid = delay(m, adds, READ_LATENCY + 2, "added_valid", reset=True)
        return register(m, total, "added"), valid, register(m, cut, "added_cut")

    def _give(
        self, m: Module, logits: Logits, is_: _Kinds, whole: Signal, value: Signal, last: Signal
    ) -> None:
        m.d.comb += [
            logits.valid.eq(whole & is_[Epilogue.LOGITS]),
            logits.value.eq(value),
            logits.last.eq(last),
            self.argmax.eq(logits.argmax),
        ]
        connect(m, logits.logits, flipped(self.logits))

    def _write(
        self,
        m: Module,
        writer: Writer,
        held: Any,
        gates: Gates,
        is_: _Kinds,
        sources: list[tuple[Value, Value, Value]],
    ) -> None:
        valid, value = [], []
        for chosen, is_there, what in sources:  # one of them is chosen at most
            valid.append(chosen & is_there)
            value.append(what.as_unsigned() & chosen.replicate(len(what)))
        m.d.comb += [
            writer.valid.eq(reduce(or_, valid)),
            writer.value.eq(reduce(or_, value)),
            writer.two.eq(is_[Epilogue.MLGRU]),
            writer.second.eq(gates.g),
            writer.dst.eq(held.dst),
            writer.dst2.eq(held.dst2),
        ]
        connect(m, writer.write, flipped(self.vector_write))
