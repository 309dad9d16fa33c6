"""The int8 activations of the products: written E at a time, read `lanes` at a time.

As many block memories as a beat has groups, side by side: a write goes to one, a read to all. What
a read of a group finds while that is written has no meaning (no_rw_check: else synthesis adds a
copy of every bit and a multiplexer).
Addresses of reads are in beats, of writes in groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Cat, Module, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl import ports

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design

READ_LATENCY = 2  # cycles from an address to registered data


class ActivationMemory(wiring.Component):
    """`data` is the beat at the `address` of READ_LATENCY cycles before."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "write": In(ports.ActivationWrite(design)),
                "address": In(range(design.activation_beats)),
                "data": Out(data.ArrayLayout(signed(8), design.lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        groups = design.lanes // design.element_lanes
        valid, beat, group, data_in = self._split(m, groups)
        beats = []
        for k in range(groups):
            words = memory.Memory(
                shape=8 * design.element_lanes,
                depth=design.activation_beats,
                init=[],
                attrs={"ram_style": "block", "no_rw_check": 1},
            )
            m.submodules[f"group_{k}"] = words
            write, read = words.write_port(), words.read_port()
            m.d.comb += [
                write.en.eq(valid & (group == k)),
                write.addr.eq(beat),
                write.data.eq(data_in),
                read.addr.eq(self.address),
            ]
            beats.append(read.data)
        m.d.sync += self.data.eq(Cat(beats))
        return m

    def _split(self, m: Module, groups: int) -> tuple[Value, Value, Value, Value]:
        """valid, beat, group of the beat and data of the write.

        Where groups is no power of two: two cycles later, with a product for the quotient.
        """
        write, bits = self.write, (groups - 1).bit_length()
        if groups == 1 << bits:
            return write.valid, write.address[bits:], write.address[:bits], write.data
        factor, shift = reciprocal(groups, self.design.activation_groups)
        valid, address, contents = _delayed(m, write.valid, write.address, write.data.as_value())
        beat = Signal(range(self.design.activation_beats))
        m.d.sync += beat.eq((address * factor) >> shift)
        valid, address, contents = _delayed(m, valid, address, contents)
        return valid, beat, (address - beat * groups)[:bits], contents


def _delayed(m: Module, *values: Value) -> list[Signal]:
    kept = [Signal(len(value)) for value in values]
    m.d.sync += [new.eq(old) for new, old in zip(kept, values, strict=True)]
    return kept


def reciprocal(divisor: int, limit: int) -> tuple[int, int]:
    """(f, s) such that n // divisor == n * f >> s for every n in 0..limit - 1."""
    shift = 0
    while True:
        factor = -(-(1 << shift) // divisor)
        # the excess of the factor, times the largest n, must not reach the next quotient
        if (factor * divisor - (1 << shift)) * limit < 1 << shift:
            return factor, shift
        shift += 1
