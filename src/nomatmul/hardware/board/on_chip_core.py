"""A small model wholly on chip: the accelerator, and its weights in block RAM beside it."""

from typing import Any

from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, connect, flipped

from nomatmul.hardware import registers
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.on_chip import OnChipMemory
from nomatmul.hardware.rtl.top import Accelerator
from nomatmul.hardware.rtl.wishbone import Wishbone


class OnChipCore(wiring.Component):
    """`bus` is the host's. `words`: the memory image. Raises ValueError as OnChipMemory."""

    def __init__(self, design: Design, words: list[int]) -> None:
        self.design = design
        self.memory = OnChipMemory(design.memory_bits, words)
        super().__init__({"bus": In(Wishbone(registers.ADDRESS_BITS))})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.accelerator = accelerator = Accelerator(self.design)
        m.submodules.memory = self.memory
        connect(m, accelerator.memory, self.memory.port)
        connect(m, flipped(self.bus), accelerator.bus)
        return m
