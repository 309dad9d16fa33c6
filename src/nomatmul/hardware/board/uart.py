"""A serial line: 8 data bits, no parity, one stop bit, low bit first."""

from typing import Any

from amaranth import Cat, Const, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out


def divisor(clock_hz: float, baud: int) -> int:
    """Cycles a bit. Raises ValueError where rounding would lose the last bit of a byte."""
    cycles = round(clock_hz / baud)
    if cycles < 4 or abs(cycles * baud / clock_hz - 1) > 0.02:
        raise ValueError(f"{baud} baud cannot be divided from a clock of {clock_hz / 1e6:g} MHz")
    return cycles


class UartReceiver(wiring.Component):
    """`valid` for one cycle with each byte; bytes whose stop bit is missing are dropped."""

    rx: In(1, init=1)
    valid: Out(1)
    data: Out(8)

    def __init__(self, cycles: int) -> None:
        self.cycles = cycles
        super().__init__()

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        rx = Signal(init=1)
        m.submodules.sync = FFSynchronizer(self.rx, rx, init=1, stages=2)
        timer = Signal(range(2 * self.cycles))
        bit = Signal(range(9))
        m.d.sync += self.valid.eq(0)
        with m.If(timer != 0):
            m.d.sync += timer.eq(timer - 1)
        with m.FSM():
            with m.State("IDLE"), m.If(~rx):
                m.d.sync += [timer.eq(self.cycles // 2 - 1), bit.eq(0)]
                m.next = "START"
            with m.State("START"), m.If(timer == 0):
                m.d.sync += timer.eq(self.cycles - 1)
                m.next = "DATA"
                with m.If(rx):  # a glitch
                    m.next = "IDLE"
            with m.State("DATA"), m.If(timer == 0):
                m.d.sync += timer.eq(self.cycles - 1)
                with m.If(bit == 8):
                    m.d.sync += self.valid.eq(rx)
                    m.next = "END"
                with m.Else():
                    m.d.sync += [self.data.eq(Cat(self.data[1:], rx)), bit.eq(bit + 1)]
            with m.State("END"), m.If(rx):  # a broken line sends no bytes
                m.next = "IDLE"
        return m


class UartTransmitter(wiring.Component):
    """Sends the bytes of `bytes`."""

    bytes: In(stream.Signature(8))
    tx: Out(1, init=1)

    def __init__(self, cycles: int) -> None:
        self.cycles = cycles
        super().__init__()

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        timer = Signal(range(self.cycles))
        left = Signal(range(11))
        bits = Signal(10, init=-1)
        m.d.comb += self.bytes.ready.eq(left == 0)
        m.d.sync += self.tx.eq(bits[0])
        with m.If(self.bytes.valid & self.bytes.ready):
            m.d.sync += [
                bits.eq(Cat(Const(0, 1), self.bytes.payload, Const(1, 1))),
                left.eq(10),
                timer.eq(self.cycles - 1),
            ]
        with m.Elif(left != 0):
            with m.If(timer == 0):
                m.d.sync += [
                    bits.eq(Cat(bits[1:], Const(1, 1))),
                    left.eq(left - 1),
                    timer.eq(self.cycles - 1),
                ]
            with m.Else():
                m.d.sync += timer.eq(timer - 1)
        return m
