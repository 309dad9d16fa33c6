"""Write the design as plain Verilog, with the top and the constraints of a board.

OUT gets the Verilog of the accelerator and, for `ulx3s`, the SDRAM controller, the UART that a host
talks through, and the pins; `axi` is a generic top for boards with DDR behind an AXI port. The
design fits any model that fits its memories: weights come from `nomatmul hardware compile`. OUT
must not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nomatmul.cli.hardware_options import DesignOptions, design_of, note
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json, print_table
from nomatmul.cli.signals import clean_up_when_terminated

EXAMPLES = """
examples:
  nomatmul hardware verilog design
  nomatmul hardware verilog design --board axi --lanes 512 --memory-bits 512
  nomatmul hardware verilog design --lanes 128 --set element_lanes=4
  nomatmul hardware verilog design --board core --on-chip my-compiled   a small model, on chip
"""


@dataclass(frozen=True, kw_only=True)
class Options(DesignOptions):
    out: str = option(positional=True, metavar="OUT", help="the directory to make")
    board: str = option("ulx3s", choices=("ulx3s", "axi", "core"), help="core: no board at all")
    trees: bool = option(False, help="with the unit of ternary trees (fast feedforward)")
    on_chip: str | None = option(
        None,
        metavar="COMPILED",
        help="a compiled model that lies in block RAM, for --board core; its design counts",
    )
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.hardware.board.write import write_verilog

    clean_up_when_terminated()
    design = design_of(options, None, trees=options.trees)
    summary = write_verilog(design, Path(options.out), options.board, options.on_chip, note=note)
    if options.json:
        print_json(summary)
    else:
        summary["files"] = ", ".join(summary["files"])
        print_table([(name.replace("_", " "), str(value)) for name, value in summary.items()])
    return 0
