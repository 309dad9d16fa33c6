"""A unit with four pins, so that it can be placed and routed alone.

A unit has more ports than a chip has pins. Its inputs come from one long shift register and its
outputs go into registers and a pipelined parity, so every path of the unit begins and ends at
registers, as it does inside the whole, and nothing of it is optimised away.
"""

from typing import Any

from amaranth import Cat, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

_ARITY = 4  # bits that one stage of the parity joins: one LUT


class Enclosed(wiring.Component):
    """`component` between registers; `registers`: how many the enclosure adds, once elaborated."""

    serial: In(1)
    shift: In(1)
    parity: Out(1)

    def __init__(self, component: wiring.Component) -> None:
        super().__init__()
        self.component = component
        self.registers = 0

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.unit = self.component
        inputs, outputs = [], []
        for _, member, value in self.component.signature.flatten(self.component):
            (inputs if member.flow is wiring.In else outputs).append(Value.cast(value))
        into = Cat(*inputs)
        chain = Signal(len(into))
        with m.If(self.shift):
            m.d.sync += chain.eq(Cat(self.serial, chain))
        m.d.comb += into.eq(chain)
        self.registers = len(chain)

        level: Value = Cat(*outputs)
        while True:
            held = Signal(len(level), name=f"parity_{len(level)}")
            m.d.sync += held.eq(level)
            self.registers += len(held)
            if len(held) == 1:
                break
            level = Cat(held[k : k + _ARITY].xor() for k in range(0, len(held), _ARITY))
        m.d.comb += self.parity.eq(held)
        return m
