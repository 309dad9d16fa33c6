"""A bridge from a serial line to Wishbone: checked frames in, checked frames out (`frames.py`).

A frame's words wait in a buffer until its check sum has proved right, so nothing of a broken frame
reaches the bus. Nothing waits for ever: a frame that stops coming is dropped after
`receive_timeout` cycles, a bus that does not acknowledge after `bus_timeout`.
"""

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.board.frames import (
    CRC_START,
    MAX_WORDS,
    START_REPLY,
    START_REQUEST,
    Operation,
    Status,
)
from nomatmul.hardware.board.memory_map import BUS_ADDRESS_BITS
from nomatmul.hardware.board.uart import UartReceiver, UartTransmitter
from nomatmul.hardware.rtl.wishbone import Wishbone

_HEAD_BYTES = 7  # operation, tag, count, address


def next_crc(crc: Value, byte: Value) -> Value:
    """CRC-16/CCITT-FALSE of one byte more, in three levels of exclusive or."""
    x = (byte ^ crc[8:])[:8]
    x = (x ^ (x >> 4))[:8]
    return ((crc << 8) ^ (x << 12) ^ (x << 5) ^ x)[:16]


class WishboneUart(wiring.Component):
    """`cycles` a bit of the line; `receiving` is for a light."""

    def __init__(self, cycles: int, *, receive_timeout: int, bus_timeout: int = 1 << 16) -> None:
        self.cycles = cycles
        self.receive_timeout = receive_timeout
        self.bus_timeout = bus_timeout
        super().__init__(
            {
                "rx": In(1, init=1),
                "tx": Out(1, init=1),
                "bus": Out(Wishbone(BUS_ADDRESS_BITS)),
                "receiving": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.receiver = self.receiver = UartReceiver(self.cycles)
        m.submodules.transmitter = self.transmitter = UartTransmitter(self.cycles)
        m.submodules.buffer = buffer = memory.Memory(shape=32, depth=MAX_WORDS + 1, init=[])
        self.write, self.read = buffer.write_port(), buffer.read_port()
        self.loaded = Signal(32, reset_less=True)  # the word that was read
        m.d.sync += self.loaded.eq(self.read.data)
        m.d.comb += [self.receiver.rx.eq(self.rx), self.tx.eq(self.transmitter.tx)]

        self.head = Signal(8 * _HEAD_BYTES)
        self.operation, self.tag = self.head[:8], self.head[8:16]
        self.count, self.address = self.head[16:24], self.head[24:]
        self.crc = Signal(16, init=CRC_START)
        self.byte = Signal(range(8))  # of the head, a word or the check sum
        self.word = Signal(range(MAX_WORDS + 1))
        self.shift = Signal(32)
        self.status = Signal(2)
        self.sent = Signal(8)  # words of the reply
        # the last request that was executed
        self.kept, self.kept_tag, self.kept_operation = Signal(), Signal(8), Signal(8)
        self.kept_status, self.kept_sent = Signal(2), Signal(8)
        # it runs down to -1: a sign is found sooner than a zero
        self.timer = Signal(range(-1, max(self.receive_timeout, self.bus_timeout)))
        self.late = Signal()
        m.d.comb += self.late.eq(self.timer[-1])
        with m.If(~self.late):
            m.d.sync += self.timer.eq(self.timer - 1)
        self.is_write = Signal()
        self.is_read = Signal()
        m.d.comb += [
            self.is_write.eq(
                (self.operation == Operation.WRITE) | (self.operation == Operation.WRITE_SAME)
            ),
            self.is_read.eq(
                (self.operation == Operation.READ) | (self.operation == Operation.READ_SAME)
            ),
            self.read.addr.eq(self.word),
            self.read.en.eq(1),
            self.write.addr.eq(self.word),
        ]
        with m.FSM() as fsm:
            self._receive(m)
            self._execute(m)
            self._reply(m)
        m.d.comb += self.receiving.eq(~fsm.ongoing("IDLE"))
        return m

    # -- receive ----------------------------------------------------------------------------------

    def _take(self, m: Module) -> None:
        m.d.sync += [
            self.timer.eq(self.receive_timeout - 1),
            self.crc.eq(next_crc(self.crc, self.receiver.data)),
            self.byte.eq(self.byte + 1),
        ]

    def _receive(self, m: Module) -> None:
        valid, byte = self.receiver.valid, self.receiver.data
        with m.State("IDLE"):
            m.d.sync += [
                self.timer.eq(self.receive_timeout - 1),
                self.crc.eq(CRC_START),
                self.byte.eq(0),
                self.word.eq(0),
            ]
            with m.If(valid & (byte == START_REQUEST)):
                m.next = "HEAD"
        with m.State("HEAD"):
            with m.If(valid):
                self._take(m)
                m.d.sync += self.head.eq(Cat(self.head, byte)[8:])
                with m.If(self.byte == _HEAD_BYTES - 1):
                    m.d.sync += self.byte.eq(0)
                    m.next = "HEAD_DONE"
            with m.Elif(self.late):
                m.next = "IDLE"
        with m.State("HEAD_DONE"):
            m.next = "CHECK_LOW"
            with m.If(self.is_write & (self.count != 0)):
                m.next = "WORDS"
        with m.State("WORDS"):
            m.d.comb += self.write.data.eq(Cat(self.shift, byte)[8:])
            with m.If(valid):
                self._take(m)
                m.d.sync += self.shift.eq(Cat(self.shift, byte)[8:])
                with m.If(self.byte == 3):
                    m.d.comb += self.write.en.eq(1)
                    m.d.sync += [
                        self.byte.eq(0),
                        self.word.eq(self.word + 1),
                        # a kept answer of a read lay in this buffer
                        self.kept.eq(self.kept & (self.kept_sent == 0)),
                    ]
                    with m.If(self.word + 1 == self.count):
                        m.next = "CHECK_LOW"
            with m.Elif(self.late):
                m.next = "IDLE"
        self._check(m)

    def _check(self, m: Module) -> None:
        """Compare the check sum, then decide what becomes of the frame."""
        valid, byte = self.receiver.valid, self.receiver.data
        right = Signal()
        with m.State("CHECK_LOW"):
            with m.If(valid):
                m.d.sync += [
                    right.eq(byte == self.crc[:8]),
                    self.timer.eq(self.receive_timeout - 1),
                ]
                m.next = "CHECK_HIGH"
            with m.Elif(self.late):
                m.next = "IDLE"
        with m.State("CHECK_HIGH"):
            with m.If(valid):
                m.d.sync += right.eq(right & (byte == self.crc[8:]))
                m.next = "DECIDE"
            with m.Elif(self.late):
                m.next = "IDLE"
        with m.State("DECIDE"):
            m.d.sync += [self.word.eq(0), self.sent.eq(0), self.status.eq(Status.OK)]
            repeated = self.kept & (self.kept_tag == self.tag)
            m.next = "REPLY"
            with m.If(~right):
                m.d.sync += self.status.eq(Status.BAD_CRC)
            with m.Elif(self.operation == Operation.PING):
                m.d.sync += self.kept.eq(0)
            with m.Elif(repeated & (self.kept_operation == self.operation)):
                m.d.sync += [self.status.eq(self.kept_status), self.sent.eq(self.kept_sent)]
            with m.Elif(~self.is_read & ~self.is_write):
                m.d.sync += self.status.eq(Status.BAD_OPERATION)
            with m.Else():
                m.next = "FETCH"

    # -- execute ----------------------------------------------------------------------------------

    def _execute(self, m: Module) -> None:
        bus = self.bus
        same = (self.operation == Operation.READ_SAME) | (self.operation == Operation.WRITE_SAME)
        with m.State("FETCH"):  # the buffer's word comes in the next cycle
            m.d.sync += self.timer.eq(self.bus_timeout - 1)
            m.next = "FETCHED"
            with m.If(self.word == self.count):
                m.d.sync += self.sent.eq(Mux(self.is_read, self.count, 0))
                m.next = "KEEP"
        with m.State("FETCHED"):  # ... and passes a register
            m.next = "START"
        with m.State("START"):
            m.d.sync += [
                bus.cyc.eq(1),
                bus.stb.eq(1),
                bus.we.eq(self.is_write),
                bus.adr.eq(self.address),
                bus.dat_w.eq(self.loaded),
            ]
            m.next = "WAIT"
        with m.State("WAIT"):
            m.d.comb += [self.write.data.eq(bus.dat_r), self.write.en.eq(bus.ack & self.is_read)]
            with m.If(bus.ack | self.late):
                m.d.sync += [bus.cyc.eq(0), bus.stb.eq(0)]
            with m.If(bus.ack):
                m.d.sync += [
                    self.word.eq(self.word + 1),
                    self.address.eq(Mux(same, self.address, self.address + 1)),
                ]
                m.next = "FETCH"
            with m.Elif(self.late):
                m.d.sync += self.status.eq(Status.NO_ANSWER)
                m.next = "KEEP"
        with m.State("KEEP"):
            m.d.sync += [
                self.kept.eq(1),
                self.kept_tag.eq(self.tag),
                self.kept_operation.eq(self.operation),
                self.kept_status.eq(self.status),
                self.kept_sent.eq(self.sent),
            ]
            m.next = "REPLY"

    # -- reply ------------------------------------------------------------------------------------

    def _reply(self, m: Module) -> None:
        """Start byte, then three bytes, the words, and the check sum of those."""
        out = self.transmitter.bytes
        sent = out.valid & out.ready
        status = self.status | Const(0, 8)  # as a byte
        with m.State("REPLY"):
            m.d.comb += [out.valid.eq(1), out.payload.eq(START_REPLY)]
            m.d.sync += [
                self.crc.eq(CRC_START),
                self.word.eq(0),
                self.byte.eq(0),
                self.shift.eq(Cat(status, self.tag, self.sent)),
            ]
            with m.If(out.ready):
                m.next = "REPLY_HEAD"
        with m.State("REPLY_HEAD"):
            m.d.comb += [out.valid.eq(1), out.payload.eq(self.shift[:8])]
            with m.If(sent):
                self._sent(m)
                with m.If(self.byte == 2):
                    m.d.sync += self.byte.eq(0)
                    m.next = "REPLY_LOAD"
        with m.State("REPLY_LOAD"):  # the buffer's word comes in the next cycle
            m.next = "REPLY_READ"
            with m.If(self.word == self.sent):
                m.next = "REPLY_LOW"
        with m.State("REPLY_READ"):  # ... and passes a register
            m.next = "REPLY_LOADED"
        with m.State("REPLY_LOADED"):
            m.d.sync += [self.shift.eq(self.loaded), self.word.eq(self.word + 1)]
            m.next = "REPLY_WORD"
        with m.State("REPLY_WORD"):
            m.d.comb += [out.valid.eq(1), out.payload.eq(self.shift[:8])]
            with m.If(sent):
                self._sent(m)
                with m.If(self.byte == 3):
                    m.d.sync += self.byte.eq(0)
                    m.next = "REPLY_LOAD"
        with m.State("REPLY_LOW"):
            m.d.comb += [out.valid.eq(1), out.payload.eq(self.crc[:8])]
            with m.If(sent):
                m.next = "REPLY_HIGH"
        with m.State("REPLY_HIGH"):
            m.d.comb += [out.valid.eq(1), out.payload.eq(self.crc[8:])]
            with m.If(sent):
                m.next = "IDLE"

    def _sent(self, m: Module) -> None:
        m.d.sync += [
            self.crc.eq(next_crc(self.crc, self.shift[:8])),
            self.shift.eq(self.shift >> 8),
            self.byte.eq(self.byte + 1),
        ]
