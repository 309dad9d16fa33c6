"""AXI: a read master for weights, and an AXI4-Lite slave for the host.

For boards whose DDR memory and processor sit behind AXI (Zynq, or a soft processor with a vendor's
memory controller). The image is loaded by whoever owns the memory; the host writes where it lies.

Legend: M bits of a memory word, which is the width of the AXI data bus.
"""

from typing import Any

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.rtl.ports import BURST_BITS, WORD_ADDRESS_BITS, MemoryPort
from nomatmul.hardware.rtl.wishbone import Wishbone

AXI_ADDRESS_BITS = 64
AXI_BURST = 256  # beats at most
AXI_PAGE = 4096  # bytes that a burst may not leave
OUTSTANDING = 8  # bursts
LITE_ADDRESS_BITS = 12  # bytes
BASE_REGISTERS = 1 << (LITE_ADDRESS_BITS - 3)  # word address of the image's base, low and high


class ReadAddress(data.Struct):
    addr: AXI_ADDRESS_BITS
    len: 8  # less one


def read_data(memory_bits: int) -> data.StructLayout:
    return data.StructLayout({"data": memory_bits, "resp": 2, "last": 1})


class AxiReader(wiring.Component):
    """Turns bursts of a MemoryPort into AXI4 read bursts, in order, at `base` (bytes, of which the
    low twelve bits are not heeded: the image begins at a page).

    Bursts are cut at AXI's page and length; at most OUTSTANDING are asked ahead. An answer that is
    not OKAY gives zeros with `error`.
    """

    def __init__(self, memory_bits: int) -> None:
        self.memory_bits = memory_bits
        super().__init__(
            {
                "port": In(MemoryPort(memory_bits)),
                "base": In(AXI_ADDRESS_BITS),
                "ar": Out(stream.Signature(ReadAddress)),
                "r": In(stream.Signature(read_data(memory_bits))),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        shift = (self.memory_bits // 8).bit_length() - 1
        page = min(AXI_PAGE >> shift, AXI_BURST)  # words
        request = self.port.request
        # the ends of bursts that were asked for: is it the end of the port's burst too?
        m.submodules.ends = ends = fifo.SyncFIFO(width=1, depth=OUTSTANDING)

        left = Signal(BURST_BITS)
        address = Signal(WORD_ADDRESS_BITS)
        upto = Signal(range(page + 1))  # words to the end of the page
        m.d.comb += upto.eq(page - address[: page.bit_length() - 1])
        length = Signal(range(page + 1))
        final = Signal()
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += request.ready.eq(1)
                m.d.sync += [left.eq(request.payload.length), address.eq(request.payload.address)]
                with m.If(request.valid & (request.payload.length != 0)):
                    m.next = "CUT"
            with m.State("CUT"):
                m.d.sync += [
                    length.eq(Mux(left > upto, upto, left)),
                    final.eq(left <= upto),
                ]
                m.next = "ADDRESS"
            with m.State("ADDRESS"):
                m.d.sync += [
                    self.ar.payload.addr.eq(
                        Cat(Const(0, 12), self.base[12:]) + Cat(Const(0, shift), address)
                    ),
                    self.ar.payload.len.eq(length - 1),
                ]
                m.next = "ROOM"
            with m.State("ROOM"), m.If(ends.w_rdy):
                m.d.comb += [ends.w_en.eq(1), ends.w_data.eq(final)]
                m.d.sync += self.ar.valid.eq(1)
                m.next = "ASK"
            with m.State("ASK"), m.If(self.ar.ready):
                m.d.sync += [
                    self.ar.valid.eq(0),
                    left.eq(left - length),
                    address.eq(address + length),
                ]
                m.next = "CUT"
                with m.If(final):
                    m.next = "IDLE"

        self._answers(m, ends)
        return m

    def _answers(self, m: Module, ends: fifo.SyncFIFO) -> None:
        """Words pass through a register of two, so that ready and valid meet registers only."""
        response, r = self.port.response, self.r
        m.submodules.words = words = fifo.SyncFIFO(width=self.memory_bits + 2, depth=2)
        bad = r.payload.resp != 0
        m.d.comb += [
            r.ready.eq(words.w_rdy & ends.r_rdy),
            words.w_en.eq(r.valid & ends.r_rdy),
            words.w_data.eq(Cat(Mux(bad, 0, r.payload.data), bad, r.payload.last & ends.r_data)),
            ends.r_en.eq(r.valid & r.ready & r.payload.last),
            response.valid.eq(words.r_rdy),
            response.payload.as_value().eq(words.r_data),
            words.r_en.eq(response.ready),
        ]


class LiteSignature(wiring.Signature):
    """AXI4-Lite of 32 bits, seen from the master, without write strobes: whole words only."""

    def __init__(self) -> None:
        super().__init__(
            {
                "aw": Out(stream.Signature(LITE_ADDRESS_BITS)),
                "w": Out(stream.Signature(32)),
                "b": In(stream.Signature(2)),
                "ar": Out(stream.Signature(LITE_ADDRESS_BITS)),
                "r": In(stream.Signature(data.StructLayout({"data": 32, "resp": 2}))),
            }
        )


class LiteBridge(wiring.Component):
    """From AXI4-Lite to Wishbone, one access at a time; reads and writes take turns.

    The image's base address is two registers of its own (BASE_REGISTERS). An address that nothing
    answers within `timeout` cycles gives SLVERR.
    """

    def __init__(self, *, timeout: int = 1 << 10) -> None:
        self.timeout = timeout
        super().__init__(
            {
                "lite": In(LiteSignature()),
                "bus": Out(Wishbone(LITE_ADDRESS_BITS - 2)),
                "base": Out(AXI_ADDRESS_BITS),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        lite, bus = self.lite, self.bus
        timer = Signal(range(self.timeout + 1))
        reading = Signal()
        turn = Signal()  # a read was served last
        okay, error = 0b00, 0b10
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += timer.eq(self.timeout)
                write = lite.aw.valid & lite.w.valid
                with m.If(lite.ar.valid & (~turn | ~write)):
                    m.d.comb += lite.ar.ready.eq(1)
                    m.d.sync += [bus.adr.eq(lite.ar.payload[2:]), bus.we.eq(0)]
                    m.d.sync += [reading.eq(1), turn.eq(1)]
                    m.next = "START"
                with m.Elif(write):
                    m.d.comb += [lite.aw.ready.eq(1), lite.w.ready.eq(1)]
                    m.d.sync += [bus.adr.eq(lite.aw.payload[2:]), bus.we.eq(1)]
                    m.d.sync += [bus.dat_w.eq(lite.w.payload), reading.eq(0), turn.eq(0)]
                    m.next = "START"
            with m.State("START"):
                m.d.sync += [lite.b.payload.eq(okay), lite.r.payload.resp.eq(okay)]
                with m.If(bus.adr[1:] == BASE_REGISTERS >> 1):
                    half = self.base.word_select(bus.adr[0], 32)
                    m.d.sync += lite.r.payload.data.eq(half)
                    with m.If(bus.we):
                        m.d.sync += half.eq(bus.dat_w)
                    m.next = "ANSWER"
                with m.Else():
                    m.d.sync += [bus.cyc.eq(1), bus.stb.eq(1)]
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.sync += timer.eq(timer - 1)
                with m.If(bus.ack | (timer == 0)):
                    m.d.sync += [bus.cyc.eq(0), bus.stb.eq(0)]
                    m.d.sync += lite.r.payload.data.eq(Mux(bus.ack, bus.dat_r, 0))
                    m.next = "ANSWER"
                with m.If(~bus.ack & (timer == 0)):
                    m.d.sync += [lite.b.payload.eq(error), lite.r.payload.resp.eq(error)]
            with m.State("ANSWER"):
                m.d.sync += [lite.r.valid.eq(reading), lite.b.valid.eq(~reading)]
                m.next = "TAKEN"
            with m.State("TAKEN"), m.If(Mux(reading, lite.r.ready, lite.b.ready)):
                m.d.sync += [lite.r.valid.eq(0), lite.b.valid.eq(0)]
                m.next = "IDLE"
        return m
