"""Frames between a host and the bridge to Wishbone (`wishbone_uart.py`): the bytes of both sides.

A request: START_REQUEST, operation, tag, count, address (4 bytes), `count` words if it writes, and
a CRC over all behind the first byte. A reply: START_REPLY, status, tag, count, `count` words, CRC.
Numbers are little endian, words have 32 bits, addresses count words. A request whose tag is that of
the last one executed is not executed again: its reply is sent once more, so that a host may repeat
a request whose reply was lost. PING forgets the last tag.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

START_REQUEST = 0x5A
START_REPLY = 0xA5
MAX_WORDS = 255
CRC_START = 0xFFFF


class Operation(IntEnum):
    PING = 0
    READ = 1  # count words from address on
    WRITE = 2
    READ_SAME = 3  # the same address count times, as of a queue
    WRITE_SAME = 4


class Status(IntEnum):
    OK = 0
    BAD_CRC = 1
    BAD_OPERATION = 2
    NO_ANSWER = 3  # nothing on the bus acknowledged in time


@dataclass(frozen=True)
class Reply:
    status: Status
    tag: int
    words: tuple[int, ...]


def crc16(data: bytes, crc: int = CRC_START) -> int:
    """CRC-16/CCITT-FALSE (polynomial 0x1021)."""
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


def request(
    operation: Operation, tag: int, address: int, count: int, words: Sequence[int] = ()
) -> bytes:
    """The bytes of a request; `words` are what it writes."""
    assert 0 <= count <= MAX_WORDS
    assert len(words) in (0, count)
    body = struct.pack(f"<BBBI{len(words)}I", operation, tag, count, address, *words)
    return bytes([START_REQUEST]) + body + struct.pack("<H", crc16(body))


def reply_length(head: bytes) -> int:
    """Bytes of a reply whose first four are `head`."""
    return 4 + 4 * head[3] + 2


def parse_reply(data: bytes) -> Reply:
    """Raises ValueError for bytes that are no whole reply."""
    if len(data) < 6 or data[0] != START_REPLY or len(data) != reply_length(data):
        raise ValueError(f"no reply: {data[:8].hex(' ')}")
    (crc,) = struct.unpack("<H", data[-2:])
    if crc != crc16(data[1:-2]):
        raise ValueError("the reply's check sum is wrong")
    if data[1] >= len(Status):
        raise ValueError(f"unknown status {data[1]}")
    return Reply(Status(data[1]), data[2], struct.unpack(f"<{data[3]}I", data[4:-2]))
