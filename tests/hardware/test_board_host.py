"""The host of a board against registers that behave as hardware/registers.py says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hardware.models import trained_model

from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.board.host import Board, main
from nomatmul.hardware.board.link import LinkError
from nomatmul.hardware.board.memory_map import MEMORY_WINDOW
from nomatmul.hardware.compile import Compiled, compile_model, formats_of, open_compiled
from nomatmul.hardware.design import Design
from nomatmul.hardware.registers import (
    VERSION,
    Control,
    Register,
    Status,
    TokenFlag,
    design_words,
)
from nomatmul.hardware.writing import ALL_LOGITS, LARGEST_LOGIT, NO_LOGITS
from nomatmul.reference.integer.model import IntegerModel

DESIGN = Design(lanes=32, memory_bits=64)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    out = tmp_path_factory.mktemp("board") / "compiled"
    compile_model(PackedReader(trained_model("glu")), DESIGN, out)
    return open_compiled(out)


class Registers:
    """A board whose answers the integer model gives, as soon as they are asked for."""

    def __init__(self, model: IntegerModel, design: Design = DESIGN, memory: int = 1 << 22) -> None:
        self.model, self.size = model, memory // 4
        self.state = model.new_state()
        self.values = dict(enumerate(design_words(design), Register.DESIGN))
        self.values |= {Register.VERSION: VERSION, Register.ANSWERS: 0}
        self.program: list[int] = []
        self.memory: dict[int, int] = {}
        self.logits: list[int] = []
        self.running = False
        self.status = int(Status.TOKEN_ROOM)

    def write(self, address: int, words: Sequence[int], *, same: bool = False) -> None:
        for number, word in enumerate(words):
            self._write(address if same else address + number, word)

    def read(self, address: int, count: int, *, same: bool = False) -> list[int]:
        return [self._read(address if same else address + n) for n in range(count)]

    def _write(self, address: int, word: int) -> None:
        if address >= MEMORY_WINDOW:
            self.memory[(address - MEMORY_WINDOW) % self.size] = word
        elif address == Register.PROGRAM_DATA:
            self.program.append(word)
        elif address == Register.CONTROL:
            self.running = bool(word & Control.RUN)
        elif address == Register.TOKEN:
            self._token(word)

    def _read(self, address: int) -> int:
        if address >= MEMORY_WINDOW:
            return self.memory.get((address - MEMORY_WINDOW) % self.size, 0)
        if address == Register.STATUS:
            return self.status
        if address == Register.LOGITS_WAITING:
            return min(30, len(self.logits))
        if address == Register.LOGIT:
            return self.logits.pop(0) & 0xFFFFFFFF
        return self.values[address]

    def _token(self, word: int) -> None:
        assert self.running
        if word & TokenFlag.FRESH:
            self.state = self.model.new_state()
        logits = self.model.step(word & 0xFFFFF, self.state)
        if not word & TokenFlag.WANT_LOGITS:
            return
        self.values[Register.ANSWERS] += 1
        self.values[Register.ARGMAX] = int(logits.argmax())
        if not word & TokenFlag.ARGMAX_ONLY:
            self.logits = logits.tolist()


@pytest.fixture(scope="module")
def model() -> IntegerModel:
    return IntegerModel.from_packed(PackedReader(trained_model("glu")), formats_of(DESIGN))


def test_a_model_is_loaded_and_answers(compiled: Compiled, model: IntegerModel) -> None:
    registers = Registers(model)
    board = Board(registers)
    seen: list[tuple[int, int]] = []
    board.load(compiled, lambda done, all: seen.append((done, all)))
    image = compiled.image_path.read_bytes()
    assert b"".join(registers.memory[k].to_bytes(4, "little") for k in range(len(image) // 4)) == (
        image
    )
    program = b"".join(word.to_bytes(4, "little") for word in registers.program)
    assert program == compiled.program_path.read_bytes()
    assert seen[-1] == (len(image) // 4, len(image) // 4)

    state = model.new_state()
    expected = [model.step(token, state) for token in (3, 5, 7)]
    assert board.token(3, NO_LOGITS, fresh=True) == {}
    assert board.token(5, LARGEST_LOGIT) == {"argmax": expected[1].argmax(), "logits": []}
    assert board.token(7, ALL_LOGITS)["logits"] == expected[2].tolist()


def test_another_design_and_another_version_are_refused(
    compiled: Compiled, model: IntegerModel
) -> None:
    with pytest.raises(LinkError, match="the board's lanes is 64, the compiled model's is 32"):
        Board(Registers(model, Design(lanes=64, memory_bits=64))).load(compiled)
    foreign = Registers(model)
    foreign.values[Register.VERSION] = 7
    with pytest.raises(LinkError, match="version is 0x00000007"):
        Board(foreign)


def test_a_memory_that_is_too_small_is_noticed(compiled: Compiled, model: IntegerModel) -> None:
    with pytest.raises(LinkError, match="word 0 of the image does not come back"):
        Board(Registers(model, memory=1 << 14)).load(compiled)


def test_faults_are_named(compiled: Compiled, model: IntegerModel) -> None:
    registers = Registers(model)
    board = Board(registers)
    board.load(compiled)
    registers.status = int(Status.MEMORY_ERROR | Status.SATURATED | Status.TOKEN_ROOM)
    with pytest.raises(LinkError, match="memory_error, saturated"):
        board.token(1, LARGEST_LOGIT, fresh=True)
    registers.status = int(Status.WATCHDOG | Status.HALTED)
    with pytest.raises(LinkError, match="halted; faults: watchdog"):
        board.token(1, LARGEST_LOGIT)


def test_a_missing_port_is_one_line(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(tmp_path / "tty")
    assert main([port, str(compiled.directory), "--packed", str(trained_model("glu"))]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot open the serial port {port}")
