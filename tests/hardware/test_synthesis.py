"""What becomes of units in synthesis: block RAM without a bypass and with its own registers, a
register a state, and no more cells than stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from amaranth import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.board.serial_core import MemoryWindow
from nomatmul.hardware.rtl.fifo import Fifo
from nomatmul.hardware.rtl.pipeline import copy
from nomatmul.hardware.rtl.scalar_unit import ScalarUnit
from nomatmul.hardware.synthesis import output_registers, yosys
from nomatmul.hardware.synthesis.programs import run_logged
from nomatmul.hardware.tools import tool


def cells(component: Any, folder: Path) -> dict[str, int]:
    design = yosys.rtlil(component, "unit")
    return yosys.synthesize(design, "unit", folder).cells


def test_block_ram_has_no_bypass_and_its_own_registers(tmp_path: Path) -> None:
    """A FIFO's registers are its counters: its output is in the block RAMs, and a bypass would keep
    the 72 bits twice more."""
    count = cells(Fifo(72, 1024), tmp_path)
    assert count["DP16KD"] > 0
    assert count["TRELLIS_FF"] < 72


def netlist(**readers: dict[str, Any]) -> dict[str, output_registers.Cell]:
    """A block RAM whose output DOB0 goes to flip-flops of these parameters and pins."""
    ram = {
        "type": "DP16KD",
        "parameters": {"DATA_WIDTH_A": "10010", "REGMODE_A": "NOREG", "REGMODE_B": "NOREG"},
        "connections": {"CLKB": [2], "DOA0": [9], "DOB0": [3], "OCEA": ["1"], "OCEB": ["1"]},
        "port_directions": {"CLKB": "input", "DOA0": "output", "DOB0": "output"},
    }
    flips = {
        name: {
            "type": "TRELLIS_FF",
            "parameters": {"CEMUX": "1 ", "LSRMUX": "LSR", **changes.get("parameters", {})},
            "connections": {"CLK": [2], "DI": [3], "LSR": ["0"], "Q": [4 + k], **changes["pins"]},
            "port_directions": dict.fromkeys(("CLK", "DI", "LSR", "CE"), "input"),
        }
        for k, (name, changes) in enumerate(readers.items())
    }
    return {"ram": ram, **flips}


def test_a_register_moves_into_the_block_ram_with_its_enable() -> None:
    cells = netlist(a={"parameters": {"CEMUX": "CE"}, "pins": {"CE": [7]}})
    output_registers.move_registers(cells)
    assert list(cells) == ["ram"]
    assert cells["ram"]["connections"]["DOB0"] == [4]
    assert cells["ram"]["connections"]["OCEB"] == [7]
    assert cells["ram"]["parameters"]["REGMODE_B"] == "OUTREG"
    assert cells["ram"]["parameters"]["REGMODE_A"] == "NOREG"


@pytest.mark.parametrize(
    "readers",
    [
        {"a": {"pins": {}}, "b": {"pins": {}}},
        {"a": {"pins": {"LSR": [8]}}},
        {"a": {"pins": {"CLK": [8]}}},
        {"a": {"pins": {}, "parameters": {"REGSET": "SET"}}},
        {"a": {"pins": {}, "parameters": {"CEMUX": "INV"}}},
        {"a": {"pins": {"DI": [5], "CE": [3]}}},
    ],
    ids=["two readers", "reset", "another clock", "set", "inverted enable", "as an enable"],
)
def test_other_registers_stay(readers: dict[str, Any]) -> None:
    cells = netlist(**readers)
    output_registers.move_registers(cells)
    assert len(cells) == 1 + len(readers)
    assert cells["ram"]["parameters"]["REGMODE_B"] == "NOREG"


def test_a_file_that_is_no_netlist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="no netlist of Yosys"):
        output_registers.use_output_registers(tmp_path / "x.json")


def test_states_in_a_register_each_do_the_same(tmp_path: Path) -> None:
    """Yosys' own proof, for 12 cycles from a reset on."""
    (tmp_path / "unit.il").write_text(yosys.rtlil(MemoryWindow(), "unit"))
    script = [
        "read_rtlil unit.il; hierarchy -top unit; proc; flatten; opt -nosdff -nodffe",
        "copy unit gold; cd unit",
        yosys.ONE_HOT,
        "fsm; opt_clean; cd; miter -equiv -flatten -make_outputs gold unit miter",
        "sat -verify -seq 12 -set-at 1 in_rst 1 -prove-skip 1 -prove trigger 0 miter",
    ]
    log = tmp_path / "log"
    run_logged([tool("yosys"), "-p", "; ".join(script)], log, folder=tmp_path, limit=600)
    assert "using `one-hot' encoding" in log.read_text()


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


def multiplier(pins: dict[str, Any], **parameters: Any) -> dict[str, output_registers.Cell]:
    """A multiplier of which P0 goes to a flip-flop with these pins besides its own."""
    product = {
        "type": "MULT18X18D",
        "parameters": parameters,
        "connections": {"A0": [1], "P0": [3], "P1": []},
        "port_directions": {"A0": "input", "P0": "output", "P1": "output"},
    }
    flip = netlist(a={"pins": pins})["a"]
    return {"product": product, "a": flip}


def test_a_register_moves_into_the_multiplier() -> None:
    cells = multiplier({})
    output_registers.move_registers(cells)
    assert list(cells) == ["product"]
    pins, parameters = cells["product"]["connections"], cells["product"]["parameters"]
    assert (pins["P0"], pins["CLK0"], pins["CE0"], pins["RST0"]) == ([4], [2], ["1"], ["0"])
    assert parameters == {f"REG_OUTPUT_{kind}": f"{kind}0" for kind in ("CLK", "CE", "RST")}


@pytest.mark.parametrize(
    ("pins", "parameters"),
    [({"LSR": [8]}, {}), ({"DI": [5]}, {}), ({}, {"REG_INPUTA_CLK": "CLK0"})],
    ids=["reset", "no register", "other registers inside"],
)
def test_a_multiplier_that_cannot_take_it_leaves_it(
    pins: dict[str, Any], parameters: dict[str, str]
) -> None:
    cells = multiplier(pins, **parameters)
    output_registers.move_registers(cells)
    assert set(cells) == {"product", "a"}
    assert cells["product"]["connections"]["P0"] == [3]
