"""The sigmoid by a table in block RAM with linear interpolation, and silu: a new z each cycle.

Only the upper half of the sigmoid is stored, as sigmoid - 1/2 (16 bits, entry 2^table_bits is
exactly 1/2) beside the step to the next entry, so that one read gives both.

Legend: z of VB bits with VF of fraction; sigma of 17 bits with 16 of fraction, 0..65536.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl.pipeline import Multiplier, delay, register
from nomatmul.reference.integer.numerics import GATE_FRACTION, TABLE_SPAN_BITS
from nomatmul.reference.integer.table import sigmoid_table

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

SIGMA_BITS = GATE_FRACTION + 1
_HALF = 1 << (GATE_FRACTION - 1)


class Sigmoid(wiring.Component):
    """sigma = sigmoid(z), `latency` cycles after z, which comes from a register."""

    latency = 8

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__({"z": In(signed(design.vector_bits)), "sigma": Out(SIGMA_BITS)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        span = design.vector_fraction + TABLE_SPAN_BITS
        between = span - design.table_bits

        size = register(m, abs(self.z), "size")
        large = size[span:].any() if len(size) > span else Const(0)
        clamped = register(m, size[:span] | large.replicate(span), "clamped")

        start, step = self._read(m, clamped[between:])
        rest = delay(m, clamped[:between], 3, "rest")
        product = register(m, step * rest, "product")
        start = register(m, start, "start")
        # the constant below the point is the half that rounds
        half = Const(1 << (between - 1), between)
        above = register(m, ((Cat(half, start) + product) >> between)[:GATE_FRACTION], "above")

        negative = delay(m, self.z[-1], self.latency - 1, "negative")
        sigma = Mux(negative, _HALF - above, _HALF + above)[:SIGMA_BITS]
        m.d.comb += self.sigma.eq(register(m, sigma, "sigma_1"))
        return m

    def _read(self, m: Module, index: Signal) -> tuple[Signal, Signal]:
        """(entry - 1/2, next entry - entry) three cycles after the index."""
        entries = sigmoid_table(self.design.table_bits).tolist()
        steps = [after - entry for entry, after in pairwise(entries)]
        step_bits = max(steps).bit_length()
        words = [
            step << GATE_FRACTION | (entry - _HALF)
            for entry, step in zip(entries, steps, strict=False)
        ]
        m.submodules.table = table = memory.Memory(
            shape=unsigned(GATE_FRACTION + step_bits), depth=len(words), init=words
        )
        port = table.read_port()
        m.d.comb += port.addr.eq(index)
        # one register beside the block RAM, one beside the multiplier
        word = delay(m, port.data, 2, "word")
        return word[:GATE_FRACTION], word[GATE_FRACTION:]


class Silu(wiring.Component):
    """silu = z * sigma rounded to VF, with the z and sigma that it came from, `latency` cycles
    after z, which comes from a register."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self._multiplier = Multiplier(design.vector_bits, SIGMA_BITS + 1)
        self.latency = Sigmoid.latency + self._multiplier.latency + 1
        element = signed(design.vector_bits)
        super().__init__(
            {
                "z": In(element),
                "silu": Out(element),
                "same_z": Out(element),
                "sigma": Out(SIGMA_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.sigmoid = sigmoid = Sigmoid(self.design)
        m.submodules.multiplier = multiplier = self._multiplier
        z = delay(m, self.z, Sigmoid.latency, "z")
        behind = self.latency - Sigmoid.latency
        m.d.comb += [
            sigmoid.z.eq(self.z),
            multiplier.a.eq(z),
            multiplier.b.eq(sigmoid.sigma),
            self.same_z.eq(delay(m, z, behind, "same_z")),
            self.sigma.eq(delay(m, sigmoid.sigma, behind, "sigma")),
        ]
        # |silu| <= |z|: no bit is lost
        silu = rounded(multiplier.product, GATE_FRACTION)[: len(self.silu)].as_signed()
        m.d.comb += self.silu.eq(register(m, silu, "silu_1"))
        return m


def rounded(value: Signal, right: int) -> Signal:
    """(value + half) >> right, signed, where right is a constant; one short addition."""
    if right == 0:
        return value
    return ((value >> (right - 1)) + 1) >> 1
