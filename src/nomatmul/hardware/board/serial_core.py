"""The accelerator with SDRAM and a serial host: all of a board but its pins.

The host's bus has two windows (memory_map.py): the accelerator's registers, and the SDRAM. What
nothing answers is reported by the bridge.
"""

from typing import Any

from amaranth import Module, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nomatmul.hardware import registers
from nomatmul.hardware.board.memory_map import BUS_ADDRESS_BITS
from nomatmul.hardware.board.sdram import Sdram
from nomatmul.hardware.board.sdram_chip import SdramChip
from nomatmul.hardware.board.sdram_pins import HOST_ADDRESS_BITS, SdramPins
from nomatmul.hardware.board.uart import divisor
from nomatmul.hardware.board.wishbone_uart import WishboneUart
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.top import Accelerator
from nomatmul.hardware.rtl.wishbone import Wishbone

RECEIVE_TIMEOUT = 0.05  # seconds; an operating system may pause a frame for milliseconds


class SerialCore(wiring.Component):
    """`lights`: memory ready, a frame comes, memory is read, heartbeat.

    io_stages: registers of the SDRAM's pins, there and back. `reset`, for 30 cycles at least, is
    for a clock domain that has none. Raises ValueError for a clock that the chip or the line
    cannot have.
    """

    def __init__(
        self, design: Design, chip: SdramChip, clock_hz: float, baud: int, *, io_stages: int = 0
    ) -> None:
        self.design, self.chip, self.clock_hz = design, chip, clock_hz
        self.sdram = Sdram(design.memory_bits, chip, clock_hz, io_stages=io_stages)
        self.bridge = WishboneUart(
            divisor(clock_hz, baud), receive_timeout=int(RECEIVE_TIMEOUT * clock_hz)
        )
        self.accelerator = Accelerator(design)
        super().__init__(
            {
                "rx": In(1, init=1),
                "tx": Out(1, init=1),
                "pins": Out(SdramPins(chip)),
                "lights": Out(4),
                "reset": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.accelerator = accelerator = self.accelerator
        sdram, bridge, window = self.sdram, self.bridge, MemoryWindow()
        m.d.sync += accelerator.reset.eq(self.reset)
        held = accelerator.reset
        # a reset of its own for each part, a cycle behind the one before, as in the accelerator
        for name, part in (("sdram", sdram), ("window", window), ("bridge", bridge)):
            before, held = held, Signal(name=f"{name}_held")
            m.d.sync += held.eq(before)
            m.submodules[name] = ResetInserter(held)(part)
        connect(m, accelerator.memory, sdram.port)
        connect(m, sdram.pins, flipped(self.pins))
        connect(m, window.host, sdram.host)
        m.d.comb += [bridge.rx.eq(self.rx), self.tx.eq(bridge.tx)]

        bus = bridge.bus
        low = registers.ADDRESS_BITS
        of_memory = bus.adr[-1]
        of_registers = bus.adr[low:] == 0
        # registers there and back, since neither side has time to spare
        m.d.sync += bus.ack.eq(0)
        for target, chosen in ((window.bus, of_memory), (accelerator.bus, of_registers)):
            asked = Signal()
            m.d.sync += asked.eq(bus.cyc & bus.stb & chosen & ~target.ack & ~bus.ack)
            with m.If(target.ack):
                m.d.sync += [bus.ack.eq(1), bus.dat_r.eq(target.dat_r)]
            m.d.comb += [
                target.cyc.eq(asked),
                target.stb.eq(asked),
                target.we.eq(bus.we),
                target.adr.eq(bus.adr),
                target.dat_w.eq(bus.dat_w),
            ]

        beat = Signal(26)
        m.d.sync += beat.eq(beat + 1)
        m.d.sync += [
            self.lights[0].eq(sdram.ready),
            self.lights[1].eq(bridge.receiving),
            self.lights[2].eq(accelerator.memory.request.valid),
            self.lights[3].eq(beat[-1]),
        ]
        return m


class MemoryWindow(wiring.Component):
    """From the bus to single words of the SDRAM. A request that the bus gave up is finished, and
    its answer dropped."""

    def __init__(self) -> None:
        super().__init__(
            {
                "bus": In(Wishbone(BUS_ADDRESS_BITS - 1)),
                "host": Out(Sdram.host_signature()),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        bus, request, response = self.bus, self.host.request, self.host.response
        m.d.sync += bus.ack.eq(0)
        with m.FSM():
            with m.State("IDLE"), m.If(bus.cyc & bus.stb & ~bus.ack):
                m.d.sync += [
                    request.payload.address.eq(bus.adr[:HOST_ADDRESS_BITS]),
                    request.payload.write.eq(bus.we),
                    request.payload.data.eq(bus.dat_w),
                    request.valid.eq(1),
                ]
                m.next = "ASK"
            with m.State("ASK"), m.If(request.ready):
                m.d.sync += [request.valid.eq(0), bus.ack.eq(request.payload.write & bus.cyc)]
                m.next = "IDLE"
                with m.If(~request.payload.write):
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.comb += response.ready.eq(1)
                with m.If(response.valid):
                    m.d.sync += [bus.dat_r.eq(response.payload), bus.ack.eq(bus.cyc)]
                    m.next = "IDLE"
        return m
