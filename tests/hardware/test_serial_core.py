"""A board's logic as one: host, serial line, bridge, registers, and SDRAM behind its pins."""

from __future__ import annotations

import dataclasses
from typing import Any

from hardware.sdram_model import SdramModel
from hardware.test_write_verilog import SMALL
from hardware.uart_line import SimulatedLine

from nomatmul.hardware.board.link import Link
from nomatmul.hardware.board.memory_map import MEMORY_WINDOW
from nomatmul.hardware.board.sdram_chip import CHIPS
from nomatmul.hardware.board.serial_core import SerialCore
from nomatmul.hardware.registers import VERSION, Register, design_words

CHIP = dataclasses.replace(CHIPS["ulx3s-32mb"], init_us=1.0)
CLOCK_HZ, BAUD = 100e6, 25_000_000


class BoardLine(SimulatedLine):
    """A board with a chip at its SDRAM pins."""

    def __init__(self) -> None:
        self.core = SerialCore(SMALL, CHIP, CLOCK_HZ, BAUD)
        super().__init__(self.core, round(CLOCK_HZ / BAUD), 2000)
        self.chip = SdramModel(CHIP, CLOCK_HZ)
        self.simulator.add_process(self._wires)

    async def _wires(self, ctx: Any) -> None:
        pins = self.core.pins
        names = ("cke", "cs", "command", "a", "ba", "dqm", "dq_o", "dq_oe")
        async for _, _, *values in ctx.tick().sample(*(getattr(pins, n) for n in names)):
            now = dict(zip(names, values, strict=True))
            oe, dq = now.pop("dq_oe"), now.pop("dq_o")
            driven = self.chip.clock(
                **now | {"command": now["command"].value}, dq=dq if oe else None
            )
            ctx.set(pins.dq_i, 0xBAD if driven is None else driven)


def test_a_host_reads_registers_and_memory() -> None:
    line = BoardLine()
    link = Link(line)
    assert link.read(Register.VERSION, 1) == [VERSION]
    assert link.read(Register.DESIGN, 3) == design_words(SMALL)[:3]
    link.write(MEMORY_WINDOW + 0x1234, [0xDEADBEEF, 0x01234567])
    assert link.read(MEMORY_WINDOW + 0x1234, 2) == [0xDEADBEEF, 0x01234567]
    assert line.chip.cells[line.chip._place(2 * 0x1235)] == 0x4567
    assert line.chip.faults == []
    assert link.repeats == 0
