"""The watchdog: says when nothing has moved for long."""

from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware import registers


class Watchdog(wiring.Component):
    """`expired` when `fed` was low for 2^registers.WATCHDOG_BITS cycles, until it is high again.

    The count is two halves with a register between, since a carry chain of all bits is slow.
    """

    fed: In(1)
    expired: Out(1)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        half = registers.WATCHDOG_BITS // 2
        low, high = Signal(half + 1, reset_less=True), Signal(half + 1, reset_less=True)
        moved = Signal(init=1)
        m.d.sync += moved.eq(self.fed)
        with m.If(moved):
            m.d.sync += [low.eq(0), high.eq(0)]
        with m.Else():
            m.d.sync += [low.eq(low[:half] + 1), high.eq(high + low[half])]
        m.d.sync += self.expired.eq(high[half] & ~moved)
        return m
