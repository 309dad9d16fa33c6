"""The recurrence of an MLGRU for one element: f, i, the lower bound and h give the next h.

    f  = lb + ((1 - lb) * sigma + half >> 16)
    h' = saturate(f * h + (1 - f) * silu(zi)), as i + f * (h - i): one multiplier

Legend: SB bits of h with HF of fraction; VB, VF of vectors; gates have 16 bits of fraction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl.functions import SIGMA_BITS, rounded
from nomatmul.hardware.rtl.pipeline import Multiplier, delay, register
from nomatmul.reference.integer.numerics import GATE_FRACTION

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

_ONE = 1 << GATE_FRACTION


def clamped(value: Signal, bits: int) -> tuple[Signal, Signal]:
    """(value saturated to `bits`, whether that changed it)."""
    upper = value[bits - 1 :]
    outside = upper.any() & ~upper.all()
    most = (1 << (bits - 1)) - 1
    limit = Mux(value[-1], Const(~most, signed(bits)), Const(most, signed(bits)))
    return Mux(outside, limit, value[:bits].as_signed()), outside


class Recurrence(wiring.Component):
    """`next_h` and `z` = next_h rounded to VF, `latency` cycles after the inputs (registers).

    `bound` is 0 where there is no lower bound. `saturated`: next_h is not the exact number, or z
    is not next_h rounded.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self._extra = design.state_fraction - design.vector_fraction
        self._entering_bits = design.vector_bits + self._extra
        self._difference_bits = max(self._entering_bits, design.state_bits) + 1
        self._multiplier = Multiplier(self._difference_bits, SIGMA_BITS + 1)
        self.f_latency = 4
        self.latency = self.f_latency + self._multiplier.latency + 4
        super().__init__(
            {
                "sigma": In(SIGMA_BITS),
                "entering": In(signed(design.vector_bits)),
                "h": In(signed(design.state_bits)),
                "bound": In(GATE_FRACTION),
                "next_h": Out(signed(design.state_bits)),
                "z": Out(signed(design.vector_bits)),
                "saturated": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        m.submodules.multiplier = multiplier = self._multiplier
        entering = Signal(signed(self._entering_bits))
        m.d.comb += entering.eq(self.entering << self._extra)
        difference = register(m, self.h - entering, "difference")
        m.d.comb += [
            multiplier.a.eq(delay(m, difference, self.f_latency - 1, "difference_late")),
            multiplier.b.eq(self._forget(m)),
        ]
        # between h and silu(zi), so no wider than their difference
        bits = self._difference_bits
        change = rounded(multiplier.product, GATE_FRACTION)[:bits].as_signed()
        late = delay(m, entering, self.latency - 3, "entering")
        exact = (late + register(m, change, "change"))[:bits].as_signed()
        exact = register(m, exact, "exact")
        state, outside = clamped(exact, design.state_bits)
        state, outside = register(m, state, "state"), register(m, outside, "outside")
        z, cut = clamped(rounded(state, self._extra), design.vector_bits)
        m.d.comb += [
            self.next_h.eq(register(m, state, "next_h_1")),
            self.z.eq(register(m, z, "z_1")),
            self.saturated.eq(register(m, outside | cut, "saturated_1")),
        ]
        return m

    def _forget(self, m: Module) -> Signal:
        """f, 0..65536, after `f_latency` cycles."""
        rest = register(m, _ONE - self.bound, "rest")[:SIGMA_BITS]
        sigma = register(m, self.sigma, "sigma")
        product = register(m, _signed(rest) * _signed(sigma), "product")
        lifted = register(m, rounded(product, GATE_FRACTION)[:SIGMA_BITS], "lifted")
        bound = delay(m, self.bound, 3, "bound")
        f = register(m, (lifted + bound)[:SIGMA_BITS], "f")
        return _signed(f)


def _signed(value: Signal) -> Signal:
    """An unsigned number as a signed one of a bit more, as signed multipliers take it."""
    return Cat(value, Const(0, 1)).as_signed()
