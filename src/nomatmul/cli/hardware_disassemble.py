"""A compiled program as text, one instruction a line, each with the value that it makes.

FILE is a directory that `nomatmul hardware compile` made, or its program.bin alone (then lines have
no names). Names are those of the integer oracle's trace: `layers.0.mixer.scan` is the absolute
maximum that scales the first mixer's input. Addresses are in elements, words of the memory, or
beats: docs/hardware.md has the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass

from nomatmul.cli.options import json_option, option
from nomatmul.cli.show import print_json

EXAMPLES = """
examples:
  nomatmul hardware disassemble compiled
  nomatmul hardware disassemble compiled | grep PRODUCT
  nomatmul hardware disassemble compiled/program.bin --json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    file: str = option(
        positional=True, metavar="FILE", help="a compiled directory, or a program.bin"
    )
    json: bool = json_option()


def run(options: Options) -> int:
    from nomatmul.hardware.compile import listing

    lines = listing(options.file)
    if options.json:
        print_json({"program": lines})
        return 0
    for line in lines:
        names = ", ".join(line["values"])
        print(f"{line['index']:5}  {line['text']:<70}{'; ' + names if names else ''}".rstrip())
    return 0
