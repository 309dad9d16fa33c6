"""What a careless host, a bad program and a broken memory do: a flag, and never a hang."""

from __future__ import annotations

import numpy as np
import pytest
from hardware.interpreter import Interpreter
from hardware.machine import Bus, Machine, small
from hardware.test_top import Image

from nomatmul.hardware import isa, registers
from nomatmul.hardware.disassemble import assemble
from nomatmul.hardware.registers import Control, Register, Status, TokenFlag, counter_address

FAULTS = (1 << registers.FAULTS) - 1
WANT = TokenFlag.WANT_LOGITS


def test_registers_say_what_the_design_is() -> None:
    design = small(packing="1.6bit", vector_words=512)
    machine = Machine(design)

    async def steps(bus: Bus) -> None:
        assert await bus.read(Register.VERSION) == registers.VERSION
        words = registers.design_words(design)
        assert [await bus.read(Register.DESIGN + k) for k in range(len(words))] == words
        assert await bus.read(Register.STATUS) == Status.HALTED | Status.TOKEN_ROOM
        for nothing in (13, 15, 31, 63, 90, 255):
            assert await bus.read(nothing) == 0
            await bus.write(nothing, 0xFFFFFFFF)
        assert await bus.read(Register.STATUS) == Status.HALTED | Status.TOKEN_ROOM
        assert await bus.read(Register.LOGIT) == 0
        assert await bus.read(Register.STATUS) & FAULTS == Status.LOGIT_UNDERRUN
        await bus.write(Register.STATUS, FAULTS & ~Status.LOGIT_UNDERRUN)
        assert await bus.read(Register.STATUS) & FAULTS == Status.LOGIT_UNDERRUN
        await bus.write(Register.STATUS, Status.LOGIT_UNDERRUN)
        assert await bus.read(Register.STATUS) & FAULTS == 0

    machine.host(steps)


def test_tokens_wait_in_order_and_one_too_many_is_flagged() -> None:
    machine = Machine(small())

    async def steps(bus: Bus) -> None:
        await bus.wait(Status.TOKEN_ROOM)
        for k in range(registers.TOKEN_QUEUE):
            assert await bus.read(Register.STATUS) & Status.TOKEN_ROOM
            await bus.write(Register.TOKEN, k)
        assert not await bus.read(Register.STATUS) & (Status.TOKEN_ROOM | Status.TOKEN_LOST)
        await bus.write(Register.TOKEN, 99)
        assert await bus.read(Register.STATUS) & Status.TOKEN_LOST
        await bus.load(["TOKEN tokens=7", "JUMP target=0"])
        status = await bus.wait(Status.BAD_TOKEN)  # the last, 7, is dropped
        assert not status & Status.HALTED
        assert await bus.wait(Status.WAITING)
        await bus.tick(30)
        assert await bus.read(Register.TOKENS) == 7
        assert await bus.read(Register.STATUS) & (Status.WAITING | Status.TOKEN_ROOM)

    machine.host(steps)


@pytest.mark.parametrize("keep", [False, True])
def test_counters_freeze_and_clear(keep: bool) -> None:
    machine = Machine(small())

    async def steps(bus: Bus) -> None:
        low = counter_address("cycles")
        await bus.write(Register.CONTROL, Control.FREEZE)
        first = await bus.read(low)
        await bus.tick(50)
        assert await bus.read(low) == first > 0
        await bus.write(Register.CONTROL, Control.CLEAR | keep * Control.FREEZE)
        assert await bus.read(Register.CONTROL) == keep * Control.FREEZE
        await bus.tick(50)
        assert (await bus.read(low) == 0) == keep
        assert await bus.read(low) < 100
        assert await bus.read(low + 1) == 0

    machine.host(steps)


BAD = [
    isa.encode(isa.Halt()) | 18,  # no such opcode
    "COMBINE base=0 stride=1 count=1 rows=4 act=0 m=0 dst=0 aux=0 fraction=0",  # it has no trees
    "JUMP target=64",
    "SCAN sd=1 src=252 count=8 ones",
    "LOADP dst=256 count=1",
    "EMBED base=0 stride=1 words=1 rows=257 dst=0 fraction=0",
    "PRODUCT rows=4 beats=9 slots=1 act=0 epilogue=store m=0",
    "PRODUCT rows=4 beats=2 slots=1 act=7 epilogue=store m=0",
]


def test_bad_instructions_halt_where_they_stand() -> None:
    machine = Machine(small())

    async def steps(bus: Bus) -> None:
        for bad in BAD:
            await bus.load(["SCONST sd=1 m=0 e=0", bad, "SCONST sd=2 m=0 e=0", "HALT"])
            status = await bus.wait(Status.HALTED)
            assert status & FAULTS == Status.BAD_INSTRUCTION, bad
            assert await bus.read(Register.PC) == 1, bad
            await bus.write(Register.STATUS, FAULTS)
        # a program without an end runs out of its memory
        await bus.load(["SCONST sd=1 m=0 e=0"] * machine.design.program_words)
        assert await bus.wait(Status.HALTED, limit=6000) & FAULTS == Status.BAD_INSTRUCTION

    machine.host(steps)
    assert [at for at, _ in machine.retired[: len(BAD)]] == [0] * len(BAD)


def head_only(rows: int) -> tuple[bytes, list[str]]:
    """A model of an embedding of one token and a head."""
    design = small()
    image = Image(design, 3)
    values = image.rng.integers(-127, 128, 32).astype(np.int8)
    record = image.add(np.array([1 << 23, -23], "<i4").tobytes() + values.tobytes())[1]
    words = image.ternary(rows, 32)
    lines = [
        f"SCONST sd=30 m={127 << 17} e=-17",
        f"SCONST sd=3 m={1 << 23} e=-23",
        "TOKEN tokens=1",
        f"EMBED base=0 stride={record} words={record} rows=32 dst=0 fraction=4",
        f"STREAM address={record} words={words}",
        "SCAN sd=1 src=0 count=32 ones",
        "SDIV sd=2 sa=30 sb=1",
        "QUANT dst=0 src=0 count=32 sa=1 sr=2 ones",
        f"PRODUCT rows={rows} beats=1 slots=1 act=0 epilogue=logits m=3 fraction=3",
        "JUMP target=2",
    ]
    return image.data, lines


def logits_of(image: bytes, lines: list[str], tokens: list[tuple[int, int, int]]) -> list[int]:
    """All logits of a program, in order."""
    done = Interpreter(small(), image, tokens).run([assemble(line) for line in lines])
    return [value for _, writes in done for (name, _), value in writes.items() if name == "logit"]


async def read_logits(bus: Bus, count: int) -> list[int]:
    """Read as they come, `count` at most."""
    found: list[int] = []
    while len(found) < count:
        waiting = await bus.read(Register.LOGITS_WAITING)
        if not waiting:
            break
        found += [await bus.signed(Register.LOGIT) for _ in range(min(waiting, count - len(found)))]
    return found


def test_a_host_that_does_not_read_logits_stops_the_machine_and_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registers, "LOGIT_QUEUE", 32)
    rows = registers.LOGIT_QUEUE + 80
    image, lines = head_only(rows)
    machine = Machine(small(), image)
    wanted = logits_of(image, lines, [(0, 1, 1)])

    async def steps(bus: Bus) -> None:
        await bus.load(lines)
        await bus.write(Register.TOKEN, WANT)
        await bus.tick(500)
        assert await bus.read(Register.LOGITS_WAITING) == registers.LOGIT_QUEUE + 2
        assert await bus.read(Register.ANSWERS) == 0
        stalls = await bus.read(counter_address("logits"))
        await bus.tick(100)
        assert await bus.read(counter_address("logits")) >= stalls + 100 > 100
        assert await read_logits(bus, rows) == wanted
        assert await bus.read(Register.ANSWERS) == 1
        assert await bus.read(Register.ARGMAX) == int(np.argmax(wanted))
        assert await bus.signed(Register.ARGMAX_VALUE) == max(wanted)
        assert await bus.read(Register.STATUS) & FAULTS == 0
        # the largest one alone: nothing waits for the host
        await bus.write(Register.TOKEN, WANT | TokenFlag.ARGMAX_ONLY)
        await bus.wait_tokens(2)
        assert await bus.read(Register.ANSWERS) == 2
        assert await bus.read(Register.LOGITS_WAITING) == 0

    machine.host(steps)


def test_memory_that_ends_or_has_illegal_codes_is_flagged() -> None:
    image, lines = head_only(24)
    for bad, flag in ((image[:-16], Status.MEMORY_ERROR), (image[:-4] + b"\xff" * 4, 1)):
        machine = Machine(small(), bad)

        async def steps(bus: Bus, flag: int = flag) -> None:
            await bus.load(lines)
            await bus.write(Register.TOKEN, WANT)
            await bus.wait_tokens(1)
            assert await bus.read(Register.STATUS) & FAULTS == flag
            assert await bus.read(Register.LOGITS_WAITING) == 24

        machine.host(steps)


@pytest.mark.parametrize("when", [25, 75, 130])
def test_a_reset_in_the_middle_leaves_nothing_behind(when: int) -> None:
    image, lines = head_only(24)
    machine = Machine(small(), image)
    wanted = logits_of(image, lines, [(0, 1, 1)])

    async def steps(bus: Bus) -> None:
        await bus.load(lines)
        for _ in range(3):
            await bus.write(Register.TOKEN, WANT)
        await bus.tick(when)
        await bus.write(Register.CONTROL, Control.RESET)
        while await bus.read(Register.STATUS) & Status.RESETTING:
            await bus.tick(1)
        status = await bus.read(Register.STATUS)
        assert status == Status.HALTED | Status.TOKEN_ROOM
        for counter in (Register.TOKENS, Register.ANSWERS, Register.LOGITS_WAITING):
            assert await bus.read(counter) == 0
        # the program is still there
        await bus.write(Register.CONTROL, Control.RUN)
        await bus.write(Register.TOKEN, WANT)
        await bus.wait_tokens(1)
        assert await read_logits(bus, 24) == wanted
        assert await bus.read(Register.STATUS) & FAULTS == 0

    machine.host(steps)


def test_a_memory_that_does_not_answer_halts_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registers, "WATCHDOG_BITS", 8)
    image, lines = head_only(24)
    machine = Machine(small(), image)
    machine.frozen = True

    async def steps(bus: Bus) -> None:
        await bus.load(lines)
        await bus.tick(1000)
        assert (
            not await bus.read(Register.STATUS) & Status.HALTED
        )  # waiting for a token is no fault
        await bus.write(Register.TOKEN, WANT)
        assert await bus.wait(Status.HALTED) & FAULTS == Status.WATCHDOG
        assert await bus.read(Register.PC) == 3
        await bus.write(Register.STATUS, FAULTS)
        await bus.write(Register.CONTROL, Control.RESET)
        await bus.tick(50)
        assert await bus.read(Register.STATUS) & Status.RESETTING  # words are still due
        await bus.write(Register.TOKEN, WANT)  # and a token has no room
        assert await bus.read(Register.STATUS) & (FAULTS | Status.TOKEN_ROOM) == Status.TOKEN_LOST
        await bus.write(Register.STATUS, FAULTS)
        machine.frozen = False
        await bus.tick(50)
        await bus.write(Register.CONTROL, Control.RUN)
        await bus.write(Register.TOKEN, WANT)
        await bus.wait_tokens(1)
        assert await read_logits(bus, 24) == logits_of(image, lines, [(0, 1, 1)])
        assert await bus.read(Register.STATUS) & FAULTS == 0

    machine.host(steps)


def test_a_stream_that_is_too_short_halts_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registers, "WATCHDOG_BITS", 8)
    image, lines = head_only(24)
    lines[4] = "STREAM address=5 words=3"
    machine = Machine(small(), image)

    async def steps(bus: Bus) -> None:
        await bus.load(lines)
        await bus.write(Register.TOKEN, WANT)
        assert await bus.wait(Status.HALTED) & FAULTS == Status.WATCHDOG
        assert await bus.read(Register.PC) == 8

    machine.host(steps)
