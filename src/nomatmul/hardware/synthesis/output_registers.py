"""Registers behind block RAMs become the block RAMs' own (ECP5's DP16KD).

A block RAM of speed grade 6 answers 5.8 ns after its clock, out of its own register 0.9 ns after
it. Yosys leaves those registers unused, so what every bit of an output goes to, one flip-flop
and nothing else, is moved into the block RAM here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
_PLAIN = {"CLKMUX": "CLK", "REGSET": "RESET"}
_WIDEST = 36  # bits of a word of which port A has the upper half


def use_output_registers(netlist: Path) -> int:
    """Change the netlist of `synth_ecp5 -json`; returns how many flip-flops went.

    Raises ValueError for another file.
    """
    try:
        design = json.loads(netlist.read_text("utf-8"))
        cells = next(
            module["cells"]
            for module in design["modules"].values()
            if int(module.get("attributes", {}).get("top", "0"), 2)
        )
    except (KeyError, StopIteration, TypeError, ValueError):
        raise ValueError(f"{netlist} is no netlist of Yosys") from None
    before = len(cells)
    move_registers(cells)
    part = netlist.with_suffix(".part")
    part.write_text(json.dumps(design), "utf-8")
    os.replace(part, netlist)
    return before - len(cells)


def move_registers(cells: dict[str, Cell]) -> None:
    """Into all block RAMs among `cells` (as in Yosys' JSON) where that is possible."""
    readers: dict[int, list[tuple[str, str]]] = {}
    for name, cell in cells.items():
        for port, bits in cell["connections"].items():
            if cell["port_directions"].get(port) == "input":
                for bit in bits:
                    if isinstance(bit, int):
                        readers.setdefault(bit, []).append((name, port))
    for ram in [cell for cell in cells.values() if cell["type"] == "DP16KD"]:
        _move(cells, ram, readers)


def _move(cells: dict[str, Cell], ram: Cell, readers: dict[int, list[tuple[str, str]]]) -> None:
    """All used outputs of a block RAM that reads at port B, or none."""
    pins = ram["connections"]
    used = {
        pin: bits[0]
        for pin, bits in pins.items()
        if pin.startswith(("DOA", "DOB")) and bits and bits[0] in readers
    }
    wide = int(ram["parameters"]["DATA_WIDTH_A"], 2) == _WIDEST
    if not used or (not wide and any(pin.startswith("DOA") for pin in used)):
        return
    registers: dict[str, str] = {}
    enables = set()
    for pin, bit in used.items():
        (name, port), *others = readers[bit]
        register = cells[name]
        if others or register["type"] != "TRELLIS_FF" or port != "DI":
            return
        if not _is_plain(register, pins["CLKB"]):
            return
        registers[pin] = name
        enables.add(_enable(register))
    if len(enables) != 1:
        return
    for pin, name in registers.items():
        pins[pin] = cells.pop(name)["connections"]["Q"]
    pins["OCEB"] = [*enables]
    ram["parameters"]["REGMODE_B"] = "OUTREG"
    if wide:  # its upper half comes out at port A, with the clock and the enable of port B
        ram["parameters"]["REGMODE_A"] = "OUTREG"
        pins["OCEA"] = pins["OCEB"]


def _enable(register: Cell) -> Any:
    """The net of its enable, or "1"."""
    if register["parameters"].get("CEMUX") == "CE":
        return register["connections"]["CE"][0]
    return "1"


def _is_plain(register: Cell, clock: list[Any]) -> bool:
    """Whether nothing resets it and the block RAM's clock drives it."""
    parameters, pins = register["parameters"], register["connections"]
    return (
        pins["CLK"] == clock
        and pins.get("LSR", ["0"]) == ["0"]
        and parameters.get("CEMUX", "CE").strip() in ("CE", "1")
        and all(parameters.get(key, value) == value for key, value in _PLAIN.items())
    )


if __name__ == "__main__":
    import sys

    print(f"{use_output_registers(Path(sys.argv[1]))} flip-flops are in block RAMs now")
