"""Quotients and square roots of whole numbers, a bit a cycle, by one subtracter.

Both keep a remainder and the result's bits so far. A step appends the next bit (of a quotient) or
two (of a root) of the dividend or radicand to the remainder, and subtracts what a 1 in the result
would take: the divisor, or 4 * root + 1. Where that leaves 0 or more, the result's next bit is 1.

Legend: B bits of a mantissa; B + 1 steps and bits of result. Invariants after k steps, which
tests/hardware/test_scalar_unit.py proves:
    quotient:  q * b + rest = (a << k) >> 1, rest < b
    root:      q * q + rest = (a << B) >> 2 (B + 1 - k), rest <= 2 q
"""

from __future__ import annotations

from amaranth import C, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Digits(wiring.Component):
    """After `start`: `value` = (a << B) // b, or with `root` isqrt(a << B); `done` when it is.

    `a` and `b` have B bits, `a` of a root B + 1; a < 2 b of a quotient. `value` stays until the
    next `start`; `done` is up in the cycle before the first one that shows it.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        super().__init__(
            {
                "start": In(1),
                "root": In(1),
                "a": In(bits + 1),
                "b": In(bits),
                "done": Out(1),
                "value": Out(bits + 1),
                # for proofs
                "rest": Out(bits + 2),
                "step": Out(range(bits + 2)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self.bits
        value, rest = (Signal.like(end, reset_less=True) for end in (self.value, self.rest))
        # `root` three times, since each drives a row of multiplexers
        roots = [Signal(reset_less=True, name=f"root{k}", attrs={"keep": 1}) for k in range(3)]
        divisor = Signal(bits, reset_less=True)
        # bits of the dividend or radicand to come, the next one highest
        more = Signal(bits + 2, reset_less=True)
        grown, taken = Signal(bits + 4), Signal(bits + 4)
        difference = Signal(bits + 5)
        m.d.comb += [
            grown.eq(Mux(roots[0], Cat(more[-2:], rest), Cat(more[-1], rest))),
            taken.eq(Mux(roots[1], Cat(C(1, 2), value), divisor)),
            difference.eq(grown - taken),
            self.done.eq(self.step == 1),
            self.value.eq(value),
            self.rest.eq(rest),
        ]
        with m.If(self.step != 0):
            m.d.sync += [
                self.step.eq(self.step - 1),
                value.eq(Cat(~difference[-1], value)),
                rest.eq(Mux(difference[-1], grown, difference)),
                more.eq(Mux(roots[2], more << 2, more << 1)),
            ]
        with m.If(self.start):
            m.d.sync += [
                *(root.eq(self.root) for root in roots),
                divisor.eq(self.b),
                value.eq(0),
                # of a dividend all bits but the last are below 2 b / 2, so they are the first rest
                rest.eq(Mux(self.root, 0, self.a >> 1)),
                more.eq(Mux(self.root, self.a, self.a[0] << (bits + 1))),
                self.step.eq(bits + 1),
            ]
        return m
