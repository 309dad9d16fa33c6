"""What Yosys makes of units: block RAM without a bypass, and no more cells than stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nomatmul.hardware.rtl.fifo import Fifo
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


def test_the_scalar_unit_is_small(tmp_path: Path) -> None:
    """603 LUT4, 80 carries of two LUTs, 435 registers when this was written."""
    count = cells(ScalarUnit(), tmp_path)
    assert count["MULT18X18D"] == 1
    assert count["LUT4"] + 2 * count["CCU2C"] < 850
    assert count["TRELLIS_FF"] < 500
