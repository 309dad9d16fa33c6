"""`lanes` products of ternary weights and int8 activations a cycle, added up by a tree.

A weight of -1 takes the activation with every bit inverted, which is one too small. The missing
ones are not counted: each adder of the tree has a carry to come in at its lowest bit, and a tree
has one adder less than lanes. The last one left goes out as `carry`, to the accumulator.

An adder at level k adds two values of 7 + k bits. In LUT4 and carry cells (ECP5) a lane costs 8
LUTs for its product, and 11 of the tree. Every level has a register behind it; the products are in
front of the first level's adders without one.

Legend: code = t + 1 in two bits (rtl/decode.py); activations lie in -127..127.
"""

from __future__ import annotations

from amaranth import Cat, Const, Module, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

ACTIVATION_BITS = 8


class TernaryArray(wiring.Component):
    """`sum + carry` is the dot product of `codes` and `activations`, `latency` cycles before.

    There is no stall. Code 3 counts as 0, like code 1.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.latency = (lanes - 1).bit_length()
        super().__init__(
            {
                "codes": In(data.ArrayLayout(unsigned(2), lanes)),
                "activations": In(data.ArrayLayout(signed(ACTIVATION_BITS), lanes)),
                "sum": Out(signed(ACTIVATION_BITS + self.latency)),
                "carry": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        values: list[Value] = []
        ones: list[Value] = []  # of negated lanes, not yet added
        for lane in range(self.lanes):
            low, high = self.codes[lane][0], self.codes[lane][1]
            bits = self.activations[lane].as_unsigned() ^ (~high).replicate(ACTIVATION_BITS)
            values.append((bits & (~low).replicate(ACTIVATION_BITS)).as_signed())
            ones.append(~high & ~low)
        for level in range(self.latency):
            values, ones = self._level(m, level, values, ones)
        m.d.comb += [self.sum.eq(values[0]), self.carry.eq(ones[0])]
        return m

    def _level(
        self, m: Module, level: int, values: list[Value], ones: list[Value]
    ) -> tuple[list[Value], list[Value]]:
        """Add in pairs, each with a carry; an odd value and the carries left wait a cycle."""
        bits = ACTIVATION_BITS + level + 1
        pairs = len(values) // 2
        added = []
        for k in range(pairs):
            total = Signal(signed(bits), name=f"sum_{level}_{k}", reset_less=True)
            m.d.sync += total.eq(add(values[2 * k], values[2 * k + 1], ones[k]))
            added.append(total)
        if len(values) % 2:
            odd = Signal(values[-1].shape(), name=f"odd_{level}", reset_less=True)
            m.d.sync += odd.eq(values[-1])
            added.append(odd)
        left = Signal(len(ones) - pairs, name=f"ones_{level}", reset_less=True)
        m.d.sync += left.eq(Cat(ones[pairs:]))
        return added, list(left)


def add(left: Value, right: Value, carry: Value) -> Value:
    """left + right + carry (signed, signed, one bit) by a single carry chain.

    Written as three terms it would become two adders: the carry comes from a bit below the lowest.
    """
    wide = Cat(Const(1, 1), left).as_signed() + Cat(carry, right).as_signed()
    return wide[1:].as_signed()
