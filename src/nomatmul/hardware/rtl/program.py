"""The two small memories of the sequencer: the program, and the scalar registers.

Both read synchronously: the answer is there one cycle after the address.
"""

from amaranth import Module, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports

PART_BITS = 32
# Nobody reads what is being written, so the memories need no bypass.
NO_CHECK = {"no_rw_check": 1}
PARTS = isa.INSTRUCTION_BITS // PART_BITS


class ProgramWrite(wiring.Signature):
    """Writes one of an instruction's four words of 32 bits; part 0 has the low ones."""

    def __init__(self, design: Design) -> None:
        super().__init__(
            {
                "valid": Out(1),
                "address": Out(range(design.program_words)),
                "part": Out(range(PARTS)),
                "data": Out(PART_BITS),
            }
        )


class ProgramMemory(wiring.Component):
    """`address` in, `word` out a cycle later; writes from the host."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "address": In(range(design.program_words)),
                "word": Out(isa.INSTRUCTION_BITS),
                "write": In(ProgramWrite(design)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for part in range(PARTS):
            bank = memory.Memory(
                shape=unsigned(PART_BITS), depth=self.design.program_words, init=[], attrs=NO_CHECK
            )
            m.submodules[f"part{part}"] = bank
            write, read = bank.write_port(), bank.read_port()
            m.d.comb += [
                read.addr.eq(self.address),
                self.word.word_select(part, PART_BITS).eq(read.data),
                write.addr.eq(self.write.address),
                write.data.eq(self.write.data),
                write.en.eq(self.write.valid & (self.write.part == part)),
            ]
        return m


class ScalarWrite(wiring.Signature):
    """Writes a scalar register."""

    def __init__(self) -> None:
        super().__init__(
            {"valid": Out(1), "address": Out(range(isa.SCALARS)), "value": Out(ports.Scalar)}
        )


class ScalarRegisters(wiring.Component):
    """`address` in, `value` out a cycle later."""

    address: In(range(isa.SCALARS))
    value: Out(ports.Scalar)
    write: In(ScalarWrite())

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.bank = bank = memory.Memory(
            shape=ports.Scalar, depth=isa.SCALARS, init=[], attrs=NO_CHECK
        )
        read, write = bank.read_port(), bank.write_port()
        m.d.comb += [
            read.addr.eq(self.address),
            self.value.eq(read.data),
            write.addr.eq(self.write.address),
            write.data.eq(self.write.value),
            write.en.eq(self.write.valid),
        ]
        return m
