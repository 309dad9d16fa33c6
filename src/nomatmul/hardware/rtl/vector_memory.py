"""The two memories that vector instructions read: elements of vectors, and int16 parameters.

Both are E banks, one per lane, so that a group of E elements is read in a cycle; each bank is a
synchronous memory of one read and one write port and becomes block RAM. The vector unit and the
row unit never run at once, so one read port is enough: the top gives it to whoever runs.

A write passes a register, since its way to all banks is long. A read of an element in the two
cycles of its write has no meaning; no unit uses one (no_rw_check: else synthesis adds a copy of
every bit and a multiplexer behind the block RAM).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaranth import Module, Shape, signed
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In

from nomatmul.hardware.rtl import ports
from nomatmul.hardware.rtl.pipeline import register

if TYPE_CHECKING:
    from nomatmul.hardware.design import Design


def _banks(m: Module, read: ports.GroupRead, shape: Shape, groups: int) -> list:
    """One memory for each lane, read by `read` together; gives their write ports."""
    writes = []
    for lane, element in enumerate(read.data):
        attrs = {"ram_style": "block", "no_rw_check": 1}
        bank = memory.Memory(shape=shape, depth=groups, init=[], attrs=attrs)
        m.submodules[f"bank{lane}"] = bank
        port = bank.read_port()
        m.d.comb += [
            port.addr.eq(read.address),
            port.en.eq(read.enable),
            element.eq(register(m, port.data, f"element{lane}")),
        ]
        writes.append(bank.write_port())
    return writes


class VectorMemory(wiring.Component):
    """`vector_words` elements of VB bits: reads of groups, writes of single elements."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {"read": In(ports.vector_read(design)), "write": In(ports.vector_write(design))}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design, write = self.design, self.write
        groups = ports.groups_of(design.vector_words, design)
        lane_bits = (design.element_lanes - 1).bit_length()
        address = register(m, write.address[lane_bits:], "write_address")
        data = register(m, write.data, "write_data")
        for lane, port in enumerate(_banks(m, self.read, signed(design.vector_bits), groups)):
            here = write.valid & (write.address[:lane_bits] == lane)
            m.d.comb += [
                port.addr.eq(address),
                port.data.eq(data),
                port.en.eq(register(m, here, f"write{lane}", reset=True)),
            ]
        return m


class ParameterMemory(wiring.Component):
    """`parameter_words` int16: reads of groups, writes of the elements of a group in `mask`."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {"read": In(ports.parameter_read(design)), "write": In(ports.parameter_write(design))}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design, write = self.design, self.write
        groups = ports.groups_of(design.parameter_words, design)
        banks = _banks(m, self.read, signed(design.weight_bits), groups)
        address = register(m, write.address, "write_address")
        for lane, (port, element) in enumerate(zip(banks, write.data, strict=True)):
            here = write.valid & write.mask[lane]
            m.d.comb += [
                port.addr.eq(address),
                port.data.eq(register(m, element, f"write_data{lane}")),
                port.en.eq(register(m, here, f"write{lane}", reset=True)),
            ]
        return m
