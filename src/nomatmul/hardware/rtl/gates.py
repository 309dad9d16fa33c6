"""The gates of the row unit: silu of single sums, GLU of pairs, MLGRU of triples.

    y -> silu -+---------------------------------------------------> silu
               +-> kept until the pair is whole: silu(gate), up -+-> product, shift -> u
               +-> kept until the triple is whole: next h -> silu, g -+

The state memory is inside: an element's h is read while its last sum is on its way through silu,
and written when it is known. What the way's end needs of its start waits in short queues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amaranth import Array, Module, Mux, Signal, signed
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.functions import Silu
from nomatmul.hardware.rtl.pipeline import InOrder, Multiplier, delay, register
from nomatmul.hardware.rtl.recurrence import Recurrence
from nomatmul.hardware.rtl.rescale import RoundingShift

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

# Cycles from the address of an element to its value: address, memory, memory's output, lane twice.
READ_LATENCY = 5
# Words of a bank of the state memory: block RAMs used two bits wide, so that few of them hang on
# one address.
_BANK_WORDS = 1 << 13
# Triples at most between a queue's push and its pop; they are three cycles apart.
_TRIPLES = 16


def read_element(m: Module, port: Any, address: Any, enable: Signal, name: str) -> Signal:
    """The element at `address`, READ_LATENCY cycles later, out of a memory of groups."""
    lanes = len(list(port.data))
    lane_bits = (lanes - 1).bit_length()
    at = register(m, address[: len(port.address) + lane_bits], f"{name}_address")
    m.d.comb += [
        port.address.eq(at[lane_bits:]),
        port.enable.eq(register(m, enable, f"{name}_enable", reset=True)),
    ]
    low = max(lane_bits - 1, 0)  # bits of the lane that are chosen by first
    lane = delay(m, at[:lane_bits], 2, f"{name}_lane")
    halves = [
        register(m, Array(list(port.data)[k : k + (1 << low)])[lane[:low]], f"{name}_half{k}")
        for k in range(0, lanes, 1 << low)
    ]
    half = register(m, lane[low:], f"{name}_half")
    return register(m, Array(halves)[half], f"{name}_element")


class Gates(wiring.Component):
    """`valid`, `y`, `slot`, `final` and `element` come from the rescaler, `is_*`, `aux`, `lb`,
    `bounded`, `fresh` and `u_shift` stand still while a command runs.

    `silu` is given for each final y, `u` for each pair or triple, a triple's `g` a cycle after its
    u. `state_saturated` and `product_saturated` pulse.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        element = signed(design.vector_bits)
        super().__init__(
            {
                "valid": In(1),
                "y": In(element),
                "slot": In(2),
                "final": In(1),
                "element": In(ports.ROW_BITS),
                "is_mlgru": In(1),
                "is_glu": In(1),
                "aux": In(ports.ELEMENT_BITS),
                "lb": In(ports.ELEMENT_BITS),
                "bounded": In(1),
                "fresh": In(1),
                "u_shift": In(ports.SHIFT_BITS),
                "parameter_read": Out(ports.parameter_read(design)),
                "state_write": Out(
                    ports.ElementWrite(design.state_words, signed(design.state_bits))
                ),
                "silu": Out(element),
                "silu_valid": Out(1),
                "u": Out(element),
                "u_valid": Out(1),
                "g": Out(element),
                "state_saturated": Out(1),
                "product_saturated": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.silu_y = silu = Silu(self.design)
        m.d.comb += silu.z.eq(self.y)
        valid = delay(m, self.valid, silu.latency, "valid", reset=True)
        slot = delay(m, self.slot, silu.latency, "slot")
        final = delay(m, self.final, silu.latency, "final")
        whole = Signal()  # the last sum of an element
        m.d.comb += [
            whole.eq(valid & final),
            self.silu.eq(silu.silu),
            self.silu_valid.eq(whole),
        ]
        # Of the sums before: sigmoid(f) of a triple, silu(i) or silu(gate).
        sigma = Signal(len(silu.sigma), reset_less=True)
        kept = Signal(signed(self.design.vector_bits), reset_less=True)
        with m.If(valid & (slot == 0)):
            m.d.sync += sigma.eq(silu.sigma)
        with m.If(valid & ~final):
            m.d.sync += kept.eq(silu.silu)

        state_silu, g, triple = self._recurrence(m, silu, sigma, kept, whole)
        a = register(m, Mux(self.is_mlgru, g, kept), "a")
        b = register(m, Mux(self.is_mlgru, state_silu, silu.same_z), "b")
        pair = whole & self.is_glu
        self._product(m, a, b, register(m, Mux(self.is_mlgru, triple, pair), "ab", reset=True))
        return m

    def _recurrence(
        self, m: Module, silu: Silu, sigma: Signal, kept: Signal, whole: Signal
    ) -> tuple[Signal, Signal, Signal]:
        """(silu(h), g, whether they are there) of a triple."""
        m.submodules.recurrence = recurrence = Recurrence(self.design)
        m.submodules.silu_h = silu_h = Silu(self.design)
        triple_comes = self.valid & self.final & self.is_mlgru
        early = silu.latency - READ_LATENCY  # the state memory takes as long
        begins = delay(m, triple_comes, early, "begins", reset=True)
        element = self._queue(m, "elements", ports.ROW_BITS, triple_comes, self.element, begins)
        known = delay(m, whole & self.is_mlgru, recurrence.latency, "known", reset=True)
        h = self._state(m, element, begins, recurrence.next_h, known)
        bound = read_element(
            m, self.parameter_read, (self.lb + element)[: ports.ELEMENT_BITS], begins, "bound"
        )
        m.d.comb += [
            recurrence.sigma.eq(sigma),
            recurrence.entering.eq(kept),
            recurrence.h.eq(h),
            recurrence.bound.eq(Mux(self.bounded, bound.as_unsigned(), 0)),
            silu_h.z.eq(recurrence.z),
            self.state_saturated.eq(known & recurrence.saturated),
        ]
        triple = delay(m, known, silu_h.latency, "triple", reset=True)
        width = signed(self.design.vector_bits)
        g = self._queue(m, "g", width, whole & self.is_mlgru, silu.same_z, triple)
        m.submodules.g_again = again = InOrder(width, _TRIPLES)
        u_late = register(m, self.u_valid & self.is_mlgru, "u_late", reset=True)
        m.d.comb += [
            again.push.eq(triple),
            again.value.eq(g),
            again.pop.eq(u_late),
            self.g.eq(again.head),
        ]
        return silu_h.silu, g, triple

    def _state(
        self, m: Module, element: Signal, begins: Signal, next_h: Signal, known: Signal
    ) -> Signal:
        """h of the element, READ_LATENCY cycles after `begins`; next_h is written where `known`."""
        design = self.design
        at = register(m, (self.aux + element)[: ceil_log2(design.state_words)], "state_address")
        reads = register(m, begins, "state_reads", reset=True)
        back = self._queue(m, "addresses", at.shape(), reads, at, known)
        m.d.comb += [
            self.state_write.valid.eq(register(m, known, "write_valid", reset=True)),
            self.state_write.address.eq(register(m, back, "write_address")),
            self.state_write.data.eq(register(m, next_h, "write_data")),
        ]
        banks = [
            self._bank(m, bank, at, reads) for bank in range(-(-design.state_words // _BANK_WORDS))
        ]
        which = delay(m, at[ceil_log2(_BANK_WORDS) :], 3, "state_bank")
        h = Array(banks)[which] if len(banks) > 1 else banks[0]
        return register(m, Mux(self.fresh, 0, h), "h")

    def _bank(self, m: Module, bank: int, at: Signal, reads: Signal) -> Signal:
        """What a bank of the state memory has at an address, three cycles later.

        Each bank has registers of its own, in front and behind, which move only for that bank: no
        multiplexer follows a block RAM, and no address goes to all of them (that took 9.4 ns).
        """
        depth, write_port = min(self.design.state_words, _BANK_WORDS), self.state_write
        # An address is never read while it is written: the elements of a command differ.
        m.submodules[f"state{bank}"] = state = memory.Memory(
            shape=signed(self.design.state_bits), depth=depth, init=[], attrs={"no_rw_check": 1}
        )
        read, write = state.read_port(), state.write_port()
        for port, there, address in (
            (read, reads, at),
            (write, write_port.valid, write_port.address),
        ):
            chosen = there & (address >> ceil_log2(depth) == bank)
            held = Signal(len(port.addr), name=f"address{bank}", reset_less=True)
            with m.If(chosen):
                m.d.sync += held.eq(address)
            m.d.comb += [
                port.en.eq(register(m, chosen, f"enable{bank}", reset=True)),
                port.addr.eq(held),
            ]
        data = Signal(signed(self.design.state_bits), name=f"data{bank}", reset_less=True)
        with m.If(write_port.address >> ceil_log2(depth) == bank):
            m.d.sync += data.eq(write_port.data)
        m.d.comb += write.data.eq(data)
        return register(m, read.data, f"bank{bank}")

    def _product(self, m: Module, a: Signal, b: Signal, valid: Signal) -> None:
        """u = a * b, shifted."""
        bits = self.design.vector_bits
        m.submodules.multiplier = multiplier = Multiplier(bits, bits)
        m.submodules.rounding = rounding = RoundingShift(2 * bits, bits, ports.SHIFT_BITS)
        latency = multiplier.latency + rounding.latency
        m.d.comb += [
            multiplier.a.eq(a),
            multiplier.b.eq(b),
            rounding.value.eq(multiplier.product),
            rounding.shift.eq(self.u_shift),
            self.u.eq(rounding.result),
            self.u_valid.eq(delay(m, valid, latency, "u_valid", reset=True)),
            self.product_saturated.eq(self.u_valid & rounding.saturated),
        ]

    def _queue(
        self, m: Module, name: str, shape: Any, push: Signal, value: Signal, pop: Signal
    ) -> Signal:
        """The head of a queue of triples."""
        m.submodules[name] = queue = InOrder(shape, _TRIPLES)
        m.d.comb += [queue.push.eq(push), queue.value.eq(value), queue.pop.eq(pop)]
        return queue.head
