"""Yosys: from a design to a netlist of a chip family's cells, and how many there are.

The design goes in as RTLIL, Yosys' own language: it reads large memories in no time, where their
Verilog takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomatmul._extras import require_hardware
from nomatmul.hardware.synthesis.output_registers import use_output_registers
from nomatmul.hardware.synthesis.programs import run_logged
from nomatmul.hardware.tools import tool

# what turns a module into cells of a family, and the step of it that maps memories
FAMILIES = {
    "ecp5": ("synth_ecp5 -top {top} -json {stem}.json", "map_ram"),
    "xc7": ("synth_xilinx -family xc7 -top {top} -flatten", "map_memory"),
}
# Yosys heeds the attribute in Verilog only. Without it, a block RAM whose reads do not see the
# writes of the same cycle gets a copy of every bit, and a multiplexer behind it.
_NO_CHECK = (
    "setparam -set RD_COLLISION_X_MASK 1'1"
    " t:$mem_v2 a:no_rw_check %i r:RD_PORTS=1 %i r:WR_PORTS=1 %i"
)
# Copies of registers that are to stay copies (`pipeline.copy`): Yosys merges equal registers but
# for cells with the attribute, and Amaranth can give it to their outputs only.
_KEEP_COPIES = "setattr -set keep 1 w:* a:keep %i %ci1:+[Q] t:$*dff* %i"
# Amaranth numbers the states of an FSM in binary, which puts two LUTs in front of all that a state
# does. Yosys makes a register of each state; it takes no FSM that has an initial value, and the
# reset, which every design here begins with, says the same.
ONE_HOT = 'setattr -unset init w:*_state; setattr -set fsm_encoding "one-hot" w:*_state'


@dataclass(frozen=True)
class Netlist:
    """`cells`: number of cells of each type; `json` is what nextpnr reads (ECP5)."""

    family: str
    top: str
    cells: dict[str, int]
    seconds: float
    json: Path


def rtlil(component: Any, top: str, ports: dict[str, Any] | None = None) -> str:
    """A component of Amaranth in RTLIL, with the lines of its source. Its module is `top`.

    ports: {name: (value, direction)} in place of those of its signature.
    """
    require_hardware("synthesis")
    from amaranth.back import rtlil as back

    text: str = back.convert(component, name=top, ports=ports, emit_src=True)
    return text


def script(read: str, top: str, stem: str, family: str = "ecp5") -> list[str]:
    """Yosys' commands from reading a design (`read`) to a netlist, of ECP5 in `stem`.json."""
    synthesis, memories = (part.format(top=top, stem=stem) for part in FAMILIES[family])
    return [
        read,
        f"hierarchy -top {top}",
        "proc",
        _KEEP_COPIES,
        ONE_HOT,
        f"{synthesis} -run begin:{memories}",
        _NO_CHECK,
        f"{synthesis} -run {memories}:",
    ]


def synthesize(
    design: str,
    top: str,
    folder: Path,
    *,
    family: str = "ecp5",
    limit: float = 3600.0,
    niceness: int = 10,
    progress: Callable[[str], None] | None = None,
) -> Netlist:
    """Synthesise module `top` of the RTLIL text; files and logs are left in `folder`.

    Raises ValueError for an unknown family or a missing Yosys, RuntimeError where it fails.
    """
    if family not in FAMILIES:
        raise ValueError(f"chip family {family!r} is not one of {', '.join(FAMILIES)}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{top}-{family}"
    (folder / f"{top}.il").write_text(design, "utf-8")
    lines = script(f"read_rtlil {top}.il", top, stem, family)
    lines.append(f"tee -q -o {stem}-stat.json stat -json")
    seconds = run_logged(
        [tool("yosys"), "-p", "; ".join(lines)],
        folder / f"{stem}-yosys.log",
        folder=folder,
        limit=limit,
        niceness=niceness,
        progress=progress,
    )
    netlist, stat = folder / f"{stem}.json", folder / f"{stem}-stat.json"
    if family == "ecp5":
        moved = use_output_registers(netlist)
        found = json.loads(stat.read_text("utf-8"))
        found["design"]["num_cells_by_type"]["TRELLIS_FF"] -= moved
        stat.write_text(json.dumps(found), "utf-8")
    return Netlist(family, top, read_cells(stat), seconds, netlist)


def read_cells(path: Path) -> dict[str, int]:
    """Cells by type of what `stat -json` wrote. Raises ValueError for another file."""
    try:
        cells = json.loads(path.read_text("utf-8"))["design"]["num_cells_by_type"]
        return {str(name): int(count) for name, count in cells.items()}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is no statistics of Yosys") from None
