"""Instructions: 128 bits and back, text and back, and every field's limit named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.hardware import isa, tables
from nomatmul.hardware.disassemble import assemble, disassemble

KINDS = list(isa.BY_OPCODE.values())


@st.composite
def instructions(draw: st.DrawFn) -> isa.Instruction:
    kind = draw(st.sampled_from(KINDS))
    values: dict[str, int] = {}
    for field in dataclasses.fields(kind):
        bits = isa.layout(kind)[field.name]
        least, most = bits.range
        steps = draw(st.integers(-(-least // bits.unit), most // bits.unit))
        values[field.name] = bool(steps) if field.type == "bool" else steps * bits.unit
    if kind is isa.Sconst and values["m"] >> 23 == 0:
        values["m"] = values["e"] = 0
    if kind is isa.Product:
        values["epilogue"] %= len(isa.Epilogue)
        values["slots"] = {isa.Epilogue.MLGRU: 3, isa.Epilogue.GLU: 2}.get(values["epilogue"], 1)
        values["m"] = min(values["m"], isa.SCALARS - values["slots"])
        values["rows"] = max(values["rows"] // values["slots"], 1) * values["slots"]
    return kind(**values)


@given(instructions())
def test_bits_and_text_come_back(instruction: isa.Instruction) -> None:
    assert isa.decode(isa.encode(instruction)) == instruction
    assert assemble(disassemble(instruction)) == instruction


@given(st.integers(0, len(KINDS) + 2), st.integers(0, (1 << 123) - 1), st.integers(0, 123))
def test_any_bits_are_an_instruction_or_refused(opcode: int, rest: int, shift: int) -> None:
    word = opcode | (rest >> shift) << isa.OPCODE_BITS
    try:
        instruction = isa.decode(word)
    except ValueError:
        return
    assert isa.encode(instruction) == word


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_value_beyond_a_field_is_named(kind: type[isa.Instruction]) -> None:
    good = assemble(GOOD[kind.name])
    for field in dataclasses.fields(kind):
        bits = isa.layout(kind)[field.name]
        least, most = bits.range
        for value in (least - 1, most + bits.unit):
            with pytest.raises(ValueError, match=rf"^{kind.name}: {field.name} is {value}\b"):
                dataclasses.replace(good, **{field.name: value})
        if bits.unit > 1:
            with pytest.raises(ValueError, match=rf"{field.name} is 6, not a multiple of 4"):
                dataclasses.replace(good, **{field.name: 6})


GOOD = {
    line.split()[0]: line
    for line in (
        "HALT",
        "TOKEN",
        "JUMP target=3",
        "SKIP target=3",
        "STREAM address=0 words=9",
        "EMBED base=1 stride=2 words=2 rows=64 dst=0 fraction=12",
        "LOADP dst=0 count=64",
        "SCONST sd=1 m=0x800000 e=-23",
        "SMUL sd=1 sa=2 sb=3",
        "SADD sd=1 sa=2 sb=3",
        "SDIV sd=1 sa=2 sb=3",
        "SSQRT sd=1 sa=2",
        "SCAN sd=1 src=0 count=64 ones",
        "SUMSQ sd=1 src=0 count=64 sa=1 w=64",
        "QUANT dst=0 src=0 count=64 sa=1 sr=2",
        "PRODUCT rows=64 beats=1 slots=1 act=0 epilogue=store m=3",
        "WALK trees=1 depth=3 base=0 stride=2 beats=1 act=0 m=3 dst=0 wout=0 fraction=12",
        "COMBINE base=0 stride=2 count=4 rows=64 act=0 m=3 dst=0 aux=0 fraction=12",
    )
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("NOP", "no instruction is named 'NOP'"),
        ("JUMP", "JUMP: target is missing"),
        ("JUMP target=1 target=2", "JUMP: target stands twice"),
        ("JUMP target=x", "JUMP: target is 'x', not a whole number"),
        ("JUMP there=1", "JUMP: no field is named 'there'"),
        ("SCAN sd=1 src=0 count=64 ones=1", "SCAN: ones is a flag"),
        ("SCONST sd=0 m=5 e=0", "SCONST: m is 5"),
        ("PRODUCT rows=64 beats=1 slots=3 act=0 epilogue=glu m=3", "slots is 3, and the epilogue"),
        ("PRODUCT rows=63 beats=1 slots=2 act=0 epilogue=glu m=3", "rows is 63, not a multiple"),
        ("PRODUCT rows=64 beats=1 slots=2 act=0 epilogue=glu m=31", "m is 31, more than 30"),
        ("PRODUCT rows=64 beats=1 slots=2 act=0 epilogue=7 m=1", "epilogue is 7, more than 5"),
    ],
)
def test_a_wrong_line_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(line)


def test_the_page_of_bits_is_that_of_the_code() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "hardware-interface.md"
    assert page.read_text(encoding="utf-8") == tables.page(), (
        "python -m nomatmul.hardware.tables > docs/hardware-interface.md"
    )
