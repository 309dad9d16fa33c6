"""The serial bridge in simulation, a host that talks to it, and lines that lose or break bytes."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hardware.uart_line import SimulatedLine

from nomatmul.hardware.board.frames import (
    Operation,
    Status,
    crc16,
    parse_reply,
    request,
)
from nomatmul.hardware.board.link import Link, LinkError, SerialPort
from nomatmul.hardware.board.uart import divisor
from nomatmul.hardware.board.wishbone_uart import WishboneUart

CYCLES = 4  # a bit
BYTE = 10 * CYCLES
RECEIVE_TIMEOUT = 4 * BYTE
SILENT = 0x300  # nothing acknowledges there
QUEUE = 0x200  # every read takes the next number


class BridgeLine(SimulatedLine):
    """A bridge, and a bus behind it that remembers writes."""

    def __init__(self) -> None:
        self.bridge = WishboneUart(CYCLES, receive_timeout=RECEIVE_TIMEOUT, bus_timeout=100)
        super().__init__(self.bridge, CYCLES, 2 * RECEIVE_TIMEOUT)
        self.simulator.add_testbench(self._bus, background=True)
        self.memory: dict[int, int] = {}
        self.writes: list[tuple[int, int]] = []
        self.queue = 0

    async def _bus(self, ctx: Any) -> None:
        bus = self.bridge.bus
        while True:
            while not (ctx.get(bus.cyc) and ctx.get(bus.stb)):
                await ctx.tick()
            address = ctx.get(bus.adr)
            if address == SILENT:
                while ctx.get(bus.cyc):
                    await ctx.tick()
                continue
            for _ in range(address % 3):
                await ctx.tick()
            if ctx.get(bus.we):
                self.memory[address] = ctx.get(bus.dat_w)
                self.writes.append((address, ctx.get(bus.dat_w)))
            elif address == QUEUE:
                self.queue += 1
            ctx.set(bus.dat_r, self.queue if address == QUEUE else self.memory.get(address, 0))
            ctx.set(bus.ack, 1)
            await ctx.tick()
            ctx.set(bus.ack, 0)


def test_words_go_there_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    line = BridgeLine()
    link = Link(line)
    words = [k * 0x01234567 & 0xFFFFFFFF for k in range(20)]
    link.write(0x10, words[:6])
    assert link.read(0x10, 6) == words[:6]
    link.write(0x3FFFFFFF, [7])
    assert link.read(0x3FFFFFFF, 1) == [7]
    link.write(0x40, words[:3], same=True)
    assert line.writes[-3:] == [(0x40, word) for word in words[:3]]
    assert link.read(QUEUE, 4, same=True) == [1, 2, 3, 4]
    monkeypatch.setattr("nomatmul.hardware.board.link.MAX_WORDS", 8)
    link.write(0x1000, words)  # three frames
    assert [line.memory[0x1000 + k] for k in range(20)] == words
    assert link.read(0x1000, 20) == words
    assert link.repeats == 0


def test_a_silent_address_and_an_unknown_operation_are_answered() -> None:
    line = BridgeLine()
    link = Link(line)
    with pytest.raises(LinkError, match="NO_ANSWER to READ at 0x300"):
        link.read(SILENT, 2)
    line.send(request(9, 77, 0, 0))  # type: ignore[arg-type]
    assert parse_reply(line.receive(6)).status == Status.BAD_OPERATION
    link.write(1, [2])  # and it goes on
    assert link.read(1, 1) == [2]


@pytest.mark.parametrize(
    ("place", "what"),
    [(0, None), (1, 0x5A), (2, 0x00), (3, None), (3, 0x5A), (6, 0x5A), (12, None), (17, 0x00)],
)
def test_a_broken_request_is_repeated_and_executed_once(place: int, what: int | None) -> None:
    line = BridgeLine()
    link = Link(line)
    line.damage_sent[line.sent + place] = what
    link.write(0x20, [0x11111111, 0x22222222])
    assert line.writes == [(0x20, 0x11111111), (0x21, 0x22222222)]
    line.damage_sent[line.sent + place % 9] = what
    assert link.read(QUEUE, 2, same=True) == [1, 2]


@pytest.mark.parametrize(
    ("place", "what"),
    [(0, None), (1, 0xA5), (2, 0x00), (3, None), (3, 0xA5), (8, 0xA5), (13, None)],
)
def test_a_broken_reply_is_asked_for_again_and_takes_nothing_twice(
    place: int, what: int | None
) -> None:
    line = BridgeLine()
    link = Link(line)
    line.damage_received[line.received + place] = what
    assert link.read(QUEUE, 2, same=True) == [1, 2]
    assert link.read(QUEUE, 1, same=True) == [3]
    line.damage_received[line.received + place % 6] = what
    link.write(0x20, [5])
    assert line.writes == [(0x20, 5)]


def test_a_frame_that_stops_is_given_up_and_noise_is_not_heard() -> None:
    line = BridgeLine()
    frame = request(Operation.WRITE, 1, 0, 2, [1, 2])
    for length in (1, 4, 8, 13, len(frame) - 1):
        line.send(frame[:length])
        line.pass_time(2 * RECEIVE_TIMEOUT)
    line.send(bytes(range(0x40)))
    assert line.writes == []
    assert Link(line).read(5, 1) == [0]


def test_a_dead_line_is_an_error() -> None:
    class Dead:
        def send(self, data: bytes) -> None: ...

        def receive(self, count: int) -> bytes:
            return b""

        def forget(self) -> None: ...

    with pytest.raises(LinkError, match="no answer to PING after 4 tries: the line is silent"):
        Link(Dead())


def test_the_check_sum_is_the_published_one() -> None:
    assert crc16(b"123456789") == 0x29B1  # CRC-16/CCITT-FALSE


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    ours, theirs = pty.openpty()
    yield ours, os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def test_a_tty_carries_frames(terminal: tuple[int, str]) -> None:
    ours, path = terminal
    line = BridgeLine()
    line.memory[3] = 0x13110A0D  # bytes that a terminal would change

    def board() -> None:
        for _ in range(2):
            data = b""
            while len(data) < 10:
                data += os.read(ours, 64)
            line.send(data)
            os.write(ours, line.receive(6 if data[1] == Operation.PING else 10))

    thread = threading.Thread(target=board)
    thread.start()
    with SerialPort(path, 115200) as port:
        assert Link(port).read(3, 1) == [0x13110A0D]
    thread.join()


def test_a_port_that_is_none_is_refused(tmp_path: Any) -> None:
    plain = tmp_path / "file"
    plain.write_bytes(b"")
    with pytest.raises(ValueError, match="no serial port"):
        SerialPort(str(plain))
    with pytest.raises(ValueError, match="cannot open"):
        SerialPort(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="123 baud"):
        SerialPort(str(plain), 123)


def test_a_speed_must_divide_the_clock() -> None:
    assert divisor(100e6, 2_000_000) == 50
    with pytest.raises(ValueError, match="40000000 baud"):
        divisor(100e6, 40_000_000)
