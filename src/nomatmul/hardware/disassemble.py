"""Instructions as lines of text, and lines as instructions: `PRODUCT rows=64 beats=2 slots=1 act=0
epilogue=store m=3`.

Fields stand in the order of the instruction; those that have a default and hold it are left out.
`assemble` of a line that `disassemble` gave is the same instruction.
"""

from __future__ import annotations

import dataclasses

from nomatmul.hardware.isa import BY_NAME, Epilogue, Instruction


def disassemble(instruction: Instruction) -> str:
    """The instruction as one line."""
    words = [instruction.name]
    for field in dataclasses.fields(instruction):
        value = getattr(instruction, field.name)
        if value == field.default:
            continue
        if field.name == "epilogue":
            words.append(f"epilogue={Epilogue(value).name.lower()}")
        else:
            words.append(field.name if value is True else f"{field.name}={value}")
    return " ".join(words)


def assemble(line: str) -> Instruction:
    """The instruction of one line; ValueError names the word that is wrong."""
    name, *words = line.split() or [""]
    if name not in BY_NAME:
        raise ValueError(f"no instruction is named {name!r}; there are {', '.join(BY_NAME)}")
    kind = BY_NAME[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, int] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in fields:
            raise ValueError(
                f"{name}: no field is named {key!r}; there are {', '.join(fields) or 'none'}"
            )
        if key in values:
            raise ValueError(f"{name}: {key} stands twice")
        values[key] = _value(name, key, text if equals else "", fields[key].type == "bool")
    missing = [
        key
        for key, field in fields.items()
        if key not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{name}: {missing[0]} is missing")
    return kind(**values)


def _value(name: str, key: str, text: str, flag: bool) -> int:
    if flag:
        if text:
            raise ValueError(f"{name}: {key} is a flag and takes no value, not {text!r}")
        return True
    if key == "epilogue" and text.upper() in Epilogue.__members__:
        return int(Epilogue[text.upper()])
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{name}: {key} is {text!r}, not a whole number") from None
