"""The accelerator: a MatMul-free model as a program and a memory image of a design in Verilog.

`compile` makes the files that the design reads, `simulate` lets it write text, cycle by cycle, and
with --check compares every value with the same arithmetic in numpy. `verilog` writes the design
for a board, `report` says what it costs and how fast it is. Needs the extra `hardware`:
pip install "nomatmul[hardware]", and for simulations perl, g++ and make.
"""

from __future__ import annotations

# name -> (module in this package, one line for `nomatmul hardware --help`)
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("hardware_compile", "turn a packed model into a program and a memory image"),
    "simulate": ("hardware_simulate", "continue a prompt on the simulated accelerator"),
    "verilog": ("hardware_verilog", "write the design as Verilog, with a board's top and pins"),
    "report": ("hardware_report", "resources, clock, tokens a second, energy, bytes a token"),
    "disassemble": ("hardware_disassemble", "a compiled program as text"),
}

EXAMPLES = """
examples:
  nomatmul hardware simulate --prompt "The river" --check    the model in the box
  nomatmul hardware compile compiled
  nomatmul hardware disassemble compiled
  nomatmul hardware simulate --help
"""
