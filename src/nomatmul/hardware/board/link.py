"""A host's end of the serial line: reads and writes words on the board's Wishbone.

`Link` speaks the frames of `frames.py` over anything with `send`, `receive` and `forget`; a frame
that is lost or broken is sent again, which the bridge executes once only. `SerialPort` is a tty of
Linux or macOS; nothing but the standard library is needed.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from nomatmul.hardware.board.frames import (
    MAX_WORDS,
    START_REPLY,
    Operation,
    Reply,
    Status,
    parse_reply,
    reply_length,
    request,
)

TRIES = 4


class Line(Protocol):
    """Bytes to and from a board."""

    def send(self, data: bytes) -> None: ...

    def receive(self, count: int) -> bytes:
        """At most `count` bytes; fewer when the line has been silent for its time-out."""
        ...

    def forget(self) -> None:
        """Drop what came, and wait until the bridge has given up on a broken frame."""
        ...


class LinkError(ValueError):
    """The board does not answer, or answers with a fault."""


class Link:
    """Words of a board, by addresses of 32-bit words. LinkError when the board is silent."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.repeats = 0  # requests that had to be sent again
        self._tag = 0
        self.ping()

    def ping(self) -> None:
        """Ask whether a bridge is there; it then takes the next request for a new one."""
        self._exchange(Operation.PING, 0, 0)

    def read(self, address: int, count: int, *, same: bool = False) -> list[int]:
        """`count` words from `address` on, or `count` times that of `address`."""
        operation = Operation.READ_SAME if same else Operation.READ
        words: list[int] = []
        while len(words) < count:
            part = min(MAX_WORDS, count - len(words))
            at = address if same else address + len(words)
            words += self._exchange(operation, at, part).words
        return words

    def write(self, address: int, words: Sequence[int], *, same: bool = False) -> None:
        """Write words from `address` on, or all to `address`."""
        operation = Operation.WRITE_SAME if same else Operation.WRITE
        for first in range(0, len(words), MAX_WORDS):
            part = words[first : first + MAX_WORDS]
            self._exchange(operation, address if same else address + first, len(part), part)

    def _exchange(
        self, operation: Operation, address: int, count: int, words: Sequence[int] = ()
    ) -> Reply:
        self._tag = (self._tag + 1) % 256
        frame = request(operation, self._tag, address, count, words)
        trouble = ""
        for attempt in range(TRIES):
            if attempt:
                self.repeats += 1
                self.line.forget()
            self.line.send(frame)
            try:
                reply = self._reply()
            except ValueError as error:
                trouble = str(error)
                continue
            if reply.tag != self._tag or reply.status == Status.BAD_CRC:
                trouble = "the request came broken"
                continue
            if reply.status != Status.OK:
                raise LinkError(
                    f"the board answers {reply.status.name} to {operation.name} at {address:#x}"
                )
            expected = count if operation in (Operation.READ, Operation.READ_SAME) else 0
            if len(reply.words) == expected:
                return reply
            trouble = f"{len(reply.words)} words came instead of {expected}"
        raise LinkError(f"no answer to {operation.name} after {TRIES} tries: {trouble}")

    def _reply(self) -> Reply:
        """The next reply. Raises ValueError where none comes, or a broken one."""
        head = self.line.receive(1)
        while head and head[0] != START_REPLY:
            head = self.line.receive(1)
        head += self.line.receive(3) if head else b""
        if len(head) < 4:
            raise ValueError("the line is silent")
        return parse_reply(head + self.line.receive(reply_length(head) - 4))


class SerialPort:
    """A tty in raw mode. Raises ValueError for a path or a speed that cannot be had."""

    def __init__(self, path: str, baud: int = 2_000_000, *, timeout: float = 0.5) -> None:
        import termios

        self.timeout = timeout
        speed = getattr(termios, f"B{baud}", None)
        if speed is None:
            raise ValueError(f"this system has no serial speed of {baud} baud")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            raise ValueError(f"cannot open the serial port {path}: {error.strerror}") from None
        try:
            control = termios.CS8 | termios.CREAD | termios.CLOCAL
            mode = [0, 0, control, 0, speed, speed, termios.tcgetattr(self._file)[6]]
            termios.tcsetattr(self._file, termios.TCSANOW, mode)
            termios.tcflush(self._file, termios.TCIOFLUSH)
        except termios.error:
            os.close(self._file)
            raise ValueError(f"{path} is no serial port") from None

    def __enter__(self) -> SerialPort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def send(self, data: bytes) -> None:
        while data:
            if not select.select([], [self._file], [], self.timeout)[1]:
                raise LinkError("the serial port takes no bytes")
            data = data[os.write(self._file, data) :]

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count and select.select([self._file], [], [], self.timeout)[0]:
            try:
                part = os.read(self._file, count - len(data))
            except OSError as error:
                raise LinkError(f"the serial port is gone: {error.strerror}") from None
            if not part:
                break
            data += part
        return data

    def forget(self) -> None:
        time.sleep(self.timeout / 2)
        while select.select([self._file], [], [], 0)[0] and os.read(self._file, 4096):
            pass
