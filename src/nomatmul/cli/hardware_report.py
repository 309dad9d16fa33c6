"""What the accelerator costs and how fast it is: resources, clock, tokens a second, energy.

Every figure says its kind: measured (by a tool on this machine), simulated (cycles of the Verilog)
or estimated (energy: activity times stated picojoules, each assumption named).
"""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.cli.hardware_options import DesignOptions, design_of, open_packed, packed_option
from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json

EXAMPLES = """
examples:
  nomatmul hardware report                                   the model in the box
  nomatmul hardware report my-packed --lanes 512 --board ddr4-x64
  nomatmul hardware report --json
"""


@dataclass(frozen=True, kw_only=True)
class Options(DesignOptions):
    packed: str | None = packed_option()
    board: str | None = option(
        None, metavar="CLASS", help="one board class alone (a wrong name lists them all)"
    )
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.hardware.report import lines, report

    reader = open_packed(options.packed)
    found = report(reader, design_of(options, reader), options.board)
    if options.json:
        print_json(found)
    else:
        print("\n".join(lines(found)))
    return 0
