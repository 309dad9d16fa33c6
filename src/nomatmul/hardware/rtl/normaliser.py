"""from_int: a whole number to the scalar m * 2^e with the highest bit of m set.

A fixed number of cycles later, one number a cycle: each step shifts by powers of two as long as
the highest bits are zeros, and keeps only the bits that can still reach m.
"""

from __future__ import annotations

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports

# Shifts of each cycle: few levels of logic between registers.
_STEPS = ((32,), (16,), (8, 4), (2, 1))
LATENCY = len(_STEPS) + 1


class Normaliser(wiring.Component):
    """`number` (at most 64 bits) to `scalar`, `LATENCY` cycles later: its highest 24 bits."""

    def __init__(self, bits: int) -> None:
        assert ports.SCALAR_BITS <= bits <= 64, bits
        self.bits = bits
        super().__init__({"number": In(bits), "scalar": Out(ports.Scalar)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # the highest step's zeros are found a cycle ahead: they choose between the most bits
        here = Signal(self.bits, reset_less=True)
        first_zeros = Signal(reset_less=True)
        m.d.sync += [
            here.eq(self.number),
            first_zeros.eq(~self.number[-_STEPS[0][0] :].any()),
        ]
        gone = Const(0, 0)  # how far `here` is shifted: its bits, the highest step first
        for index, steps in enumerate(_STEPS):
            for step in steps:
                kept = min(self.bits, ports.SCALAR_BITS + step - 1)
                if step >= self.bits:
                    gone = Cat(Const(0, 1), gone)
                    continue
                moved = Signal(kept, name=f"moved{step}")
                zeros = Signal(name=f"zeros{step}")
                size = len(here)
                found = first_zeros if index == 0 else ~here[size - step :].any()
                m.d.comb += zeros.eq(found)
                shifted = (here << step)[:size]
                m.d.comb += moved.eq(Mux(zeros, shifted, here)[size - kept :])
                gone = Cat(zeros, gone)
                here = moved
            held = Signal(len(here), name=f"held{index}", reset_less=True)
            held_gone = Signal(len(gone), name=f"gone{index}", reset_less=True)
            m.d.sync += [held.eq(here), held_gone.eq(gone)]
            here, gone = held, held_gone
        assert len(here) == ports.SCALAR_BITS
        m.d.comb += self.scalar.m.eq(here)
        with m.If(here[-1]):  # else the number is 0
            m.d.comb += self.scalar.e.eq(self.bits - ports.SCALAR_BITS - gone)
        return m
