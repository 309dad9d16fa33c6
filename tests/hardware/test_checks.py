"""The checker of instructions against the rule in Python, around every limit."""

from __future__ import annotations

import random
from typing import Any

import pytest
from amaranth.sim import Simulator
from hardware.machine import small

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.checks import Checker

FORMS = {isa.Epilogue.MLGRU: 3, isa.Epilogue.GLU: 2}


def ranges(design: Design, i: Any) -> list[tuple[int, int, int, int]]:
    """(base, size, limit, alignment) of what an instruction touches."""
    vectors, parameters = design.vector_words, design.parameter_words
    beats, elements = design.activation_beats, design.activation_beats * design.lanes
    group = design.element_lanes
    if isinstance(i, isa.Embed):
        return [(i.dst, i.rows, vectors, group)]
    if isinstance(i, isa.Loadp):
        return [(i.dst, i.count, parameters, group)]
    if isinstance(i, isa.Scan | isa.Sumsq | isa.Quant):
        found = [(i.src, i.count, vectors, group)]
        found += [] if i.ones else [(i.w, i.count, parameters, group)]
        if isinstance(i, isa.Quant):
            found.append((i.dst * design.lanes, i.count, elements, 1))
        return found
    if isinstance(i, isa.Walk):
        return [(i.act, i.beats, beats, 1)]
    if isinstance(i, isa.Combine):
        found = [(at, i.rows, vectors, group) for at in (i.dst, i.aux)]
        return [*found, (i.act * design.lanes, i.count, elements, 1)]
    if not isinstance(i, isa.Product):
        return []
    rows = -(-i.rows // i.slots)
    found = [(i.act, i.slots * i.beats, beats, 1)]
    if i.epilogue != isa.Epilogue.LOGITS:
        found.append((i.dst, rows, vectors, group))
    if i.epilogue == isa.Epilogue.ADD:
        found.append((i.aux, rows, vectors, group))
    if i.epilogue == isa.Epilogue.MLGRU:
        found += [(i.dst2, rows, vectors, group), (i.aux, rows, design.state_words, group)]
        if i.bounded:
            found.append((i.lb, rows, parameters, group))
    return found


def good(design: Design, i: isa.Instruction) -> bool:
    """Whether the design may run the instruction."""
    if isinstance(i, isa.Walk | isa.Combine) and not design.trees:
        return False
    if isinstance(i, isa.Jump | isa.Skip) and i.target >= design.program_words:
        return False
    if isinstance(i, isa.Stream) and i.words == 0:
        return False
    if isinstance(i, isa.Product) and (
        i.epilogue > max(isa.Epilogue) or i.slots != FORMS.get(i.epilogue, 1)
    ):
        return False
    return all(
        base % align == 0 and 0 < size <= limit - base
        for base, size, limit, align in ranges(design, i)
    )


def unchecked(kind: type[isa.Instruction], values: dict[str, int]) -> isa.Instruction:
    """An instruction that its own class may refuse."""
    made = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def near(rng: random.Random, bits: isa.Bits, limits: list[int]) -> int:
    """A value of a field: anything, small, or about a limit."""
    most = (1 << (bits.width - bits.signed)) - 1
    centre = rng.choice([0, rng.choice(limits) // bits.unit, rng.randint(0, most)])
    return min(max(centre + rng.randint(-3, 3), 0), most) * bits.unit


def samples(design: Design, count: int, seed: int) -> list[isa.Instruction]:
    rng = random.Random(seed)
    sizes = [design.vector_words, design.parameter_words, design.state_words]
    limits = [*sizes, *(size // 2 for size in sizes), design.program_words]
    limits += [design.activation_beats, design.activation_beats // 2, 3 * 64]
    made = []
    for k in range(count):
        kind = list(isa.BY_OPCODE.values())[k % len(isa.BY_OPCODE)]
        if k % 3 == 0:
            kind = isa.Product
        values = {name: near(rng, bits, limits) for name, bits in isa.layout(kind).items()}
        if kind is isa.Product and rng.random() < 0.9:
            values["epilogue"] %= 6
            values["slots"] = FORMS.get(isa.Epilogue(values["epilogue"]), 1)
            values["act"], values["beats"] = rng.randint(0, 3), rng.randint(0, 3)
        made.append(unchecked(kind, values))
    return made


@pytest.mark.parametrize(
    "design", [small(), small(element_lanes=8, trees=True, lanes=96)], ids=["small", "trees"]
)
def test_the_checker_refuses_what_the_design_has_not(design: Design) -> None:
    instructions = samples(design, 500, seed=5)
    checker, answers = Checker(design), []

    async def bench(ctx: Any) -> None:
        for each in instructions:
            ctx.set(checker.word, isa.encode(each))
            ctx.set(checker.start, 1)
            await ctx.tick()
            ctx.set(checker.start, 0)
            bad = False
            for _ in range(16):
                *_, done, bad = await ctx.tick().sample(checker.done, checker.bad)
                if done:
                    break
            else:
                raise AssertionError(f"no answer for {each}")
            answers.append(not bad)

    simulator = Simulator(checker)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    wanted = [good(design, each) for each in instructions]
    assert 100 < sum(wanted) < 400, "both kinds are tried"
    for each, answer, want in zip(instructions, answers, wanted, strict=True):
        assert answer == want, {"kind": each.name, **vars(each)}


@pytest.mark.parametrize("opcode", [18, 25, 31])
def test_opcodes_that_are_none(opcode: int) -> None:
    assert opcode not in isa.BY_OPCODE
    with pytest.raises(ValueError, match=f"no instruction has the opcode {opcode}"):
        isa.decode(opcode)


def test_fields_of_one_name_have_one_meaning() -> None:
    """`sd`, and `target`, are read by the sequencer at one place for all who have them."""
    for name in ("sd", "target"):
        places = {
            (bits.low, bits.width)
            for kind in isa.BY_OPCODE.values()
            for each, bits in isa.layout(kind).items()
            if each == name
        }
        assert len(places) == 1
