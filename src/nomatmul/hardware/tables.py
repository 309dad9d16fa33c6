"""The page of docs that says what the bits mean: instructions, and the host's registers.

`python -m nomatmul.hardware.tables` prints it; a test compares docs/hardware-interface.md with it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import IntEnum, IntFlag

from nomatmul.hardware import isa, registers
from nomatmul.hardware.registers import COUNTERS, Control, Register, Status, TokenFlag

_INTRODUCTION = f"""# What do the accelerator's bits mean?

Written by `python -m nomatmul.hardware.tables`, from `hardware/isa.py` and `hardware/registers.py`.

## Instructions

{isa.INSTRUCTION_BITS} bits each, the opcode in bits 0..{isa.OPCODE_BITS - 1}. `name:width` are
the fields from bit {isa.OPCODE_BITS} upwards, without gaps; `s` is signed, `*4` is kept without
its two low bits. Bits behind the last field are 0.
"""
_REGISTERS = f"""## The host's registers

A Wishbone slave of 32-bit words; addresses count words. An access takes a few cycles and never
waits for the machine. At most {registers.TOKEN_QUEUE} tokens and about {registers.LOGIT_QUEUE}
logits wait.

A counter has {2 * registers.COUNTER_HALF} bits in two halves. In order: {", ".join(COUNTERS)}.
Those from the second to `control` add up to the first.
"""


def page() -> str:
    """The page in Markdown."""
    lines = [_INTRODUCTION, "| opcode | instruction | fields | what it does |", "|---|---|---|---|"]
    lines += [_instruction(kind) for kind in isa.BY_OPCODE.values()]
    lines += ["", _REGISTERS, "| address | register | access | meaning |", "|---|---|---|---|"]
    for name, value, text in _comments(Register):
        access, _, meaning = text.partition(": ")
        lines.append(f"| {value} | `{name}` | {access} | {meaning} |")
    for kind, title in ((Control, "CONTROL"), (Status, "STATUS"), (TokenFlag, "TOKEN")):
        lines += ["", f"| bit of `{title}` | name | meaning |", "|---|---|---|"]
        lines += [
            f"| {value.bit_length() - 1} | `{name}` | {text} |"
            for name, value, text in _comments(kind)
        ]
    return "\n".join([*lines, ""])


def _instruction(kind: type[isa.Instruction]) -> str:
    fields = [
        f"{name}:{bits.width}{'s' * bits.signed}{f'*{bits.unit}' if bits.unit > 1 else ''}"
        for name, bits in isa.layout(kind).items()
    ]
    meaning = " ".join((inspect.getdoc(kind) or "").split()).replace("|", "\\|")
    return f"| {kind.opcode} | `{kind.name}` | {' '.join(fields)} | {meaning} |"


def _comments(kind: type[IntEnum] | type[IntFlag]) -> Iterator[tuple[str, int, str]]:
    """(name, value, the comment behind it) of each member."""
    source = inspect.getsource(kind)
    for member in kind:
        found = re.search(rf"^ +{member.name} = [^#\n]*# (.*)$", source, re.MULTILINE)
        assert found, f"{member.name} has no comment that says what it is"
        yield str(member.name), int(member), found[1]


if __name__ == "__main__":
    print(page(), end="")
