"""Registers behind block RAMs and multipliers become their own (ECP5's DP16KD and MULT18X18D).

A block RAM of speed grade 6 answers 5.8 ns after its clock, out of its own register 0.9 ns after
it; a multiplier has 3.9 ns and needs 3.5 in front of its own register. Yosys leaves those registers
unused, so what every bit of an output goes to, one flip-flop and nothing else, is moved here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
Readers = dict[int, list[tuple[str, str]]]  # bit -> (cell, port) of those who read it
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
    """Into all block RAMs and multipliers among `cells` (as in Yosys' JSON) that can hold them."""
    readers: Readers = {}
    for name, cell in cells.items():
        for port, bits in cell["connections"].items():
            if cell["port_directions"].get(port) == "input":
                for bit in bits:
                    if isinstance(bit, int):
                        readers.setdefault(bit, []).append((name, port))
    for cell in list(cells.values()):
        if cell["type"] == "DP16KD":
            _into_memory(cells, cell, readers)
        elif cell["type"] == "MULT18X18D":
            _into_multiplier(cells, cell, readers)


def _into_memory(cells: dict[str, Cell], ram: Cell, readers: Readers) -> None:
    """All used outputs of a block RAM that reads at port B, or none."""
    pins = ram["connections"]
    used = _used(ram, ("DOA", "DOB"), readers)
    wide = int(ram["parameters"]["DATA_WIDTH_A"], 2) == _WIDEST
    if not wide and any(pin.startswith("DOA") for pin in used):
        return
    found = _registers(cells, used, readers)
    if found is None or found[1] != pins["CLKB"]:
        return
    _absorb(cells, ram, found[0])
    pins["OCEB"] = [found[2]]
    ram["parameters"]["REGMODE_B"] = "OUTREG"
    if wide:  # its upper half comes out at port A, with the clock and the enable of port B
        ram["parameters"]["REGMODE_A"] = "OUTREG"
        pins["OCEA"] = pins["OCEB"]


def _into_multiplier(cells: dict[str, Cell], multiplier: Cell, readers: Readers) -> None:
    """All used outputs of a multiplier without any register, or none."""
    if any(name.startswith("REG_") for name in multiplier["parameters"]):
        return
    found = _registers(cells, _used(multiplier, ("P",), readers), readers)
    if found is None:
        return
    registers, clock, enable = found
    _absorb(cells, multiplier, registers)
    for pin, bits in (("CLK0", clock), ("CE0", [enable]), ("RST0", ["0"])):
        multiplier["connections"][pin] = bits
        multiplier["port_directions"][pin] = "input"
    for kind in ("CLK", "CE", "RST"):
        multiplier["parameters"][f"REG_OUTPUT_{kind}"] = f"{kind}0"


def _used(cell: Cell, outputs: tuple[str, ...], readers: Readers) -> dict[str, int]:
    """Pin -> bit of the outputs that somebody reads; outputs: how their names begin, a number
    behind it."""
    return {
        pin: bits[0]
        for pin, bits in cell["connections"].items()
        if pin.startswith(outputs) and pin[-1].isdigit() and bits and bits[0] in readers
    }


def _registers(
    cells: dict[str, Cell], used: dict[str, int], readers: Readers
) -> tuple[dict[str, str], list[Any], Any] | None:
    """(pin -> its flip-flop, their clock, their enable) where each pin goes to one flip-flop and
    nothing else, and all have one clock and one enable; else None."""
    registers: dict[str, str] = {}
    enables, clocks = set(), set()
    for pin, bit in used.items():
        (name, port), *others = readers[bit]
        register = cells[name]
        if others or register["type"] != "TRELLIS_FF" or port != "DI" or not _is_plain(register):
            return None
        registers[pin] = name
        enables.add(_enable(register))
        clocks.add(register["connections"]["CLK"][0])
    if len(enables) != 1 or len(clocks) != 1:
        return None
    return registers, [*clocks], enables.pop()


def _absorb(cells: dict[str, Cell], cell: Cell, registers: dict[str, str]) -> None:
    for pin, name in registers.items():
        cell["connections"][pin] = cells.pop(name)["connections"]["Q"]


def _enable(register: Cell) -> Any:
    """The net of its enable, or "1"."""
    if register["parameters"].get("CEMUX") == "CE":
        return register["connections"]["CE"][0]
    return "1"


def _is_plain(register: Cell) -> bool:
    """Whether nothing resets it."""
    parameters, pins = register["parameters"], register["connections"]
    return (
        pins.get("LSR", ["0"]) == ["0"]
        and parameters.get("CEMUX", "CE").strip() in ("CE", "1")
        and all(parameters.get(key, value) == value for key, value in _PLAIN.items())
    )


if __name__ == "__main__":
    import sys

    moved = use_output_registers(Path(sys.argv[1]))
    print(f"{moved} flip-flops are in block RAMs and multipliers now")
