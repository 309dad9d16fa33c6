"""What Yosys makes of units: block RAM without a bypass, and no more cells than stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amaranth import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl.fifo import Fifo
from nomatmul.hardware.rtl.pipeline import copy
from nomatmul.hardware.rtl.scalar_unit import ScalarUnit
from nomatmul.hardware.synthesis import yosys


def cells(component: Any, folder: Path) -> dict[str, int]:
    design = yosys.rtlil(component, "unit")
    return yosys.synthesize(design, "unit", folder).cells


def test_block_ram_has_no_bypass(tmp_path: Path) -> None:
    """A FIFO's registers are its output and counters: a bypass keeps the 72 bits twice more."""
    count = cells(Fifo(72, 1024), tmp_path)
    assert count["DP16KD"] > 0
    assert count["TRELLIS_FF"] < 2 * 72


class Copies(wiring.Component):
    """Four registers of the same value."""

    def __init__(self) -> None:
        super().__init__({"value": In(8), "copies": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.copies.eq(Cat(copy(m, self.value) for _ in range(4)))
        return m


def test_copies_of_registers_stay(tmp_path: Path) -> None:
    assert cells(Copies(), tmp_path)["TRELLIS_FF"] == 32


def test_the_scalar_unit_is_small(tmp_path: Path) -> None:
    """603 LUT4, 80 carries of two LUTs, 435 registers when this was written."""
    count = cells(ScalarUnit(), tmp_path)
    assert count["MULT18X18D"] == 1
    assert count["LUT4"] + 2 * count["CCU2C"] < 850
    assert count["TRELLIS_FF"] < 500
