"""The top level for boards with AXI: the accelerator between a memory and a processor.

Port names are those that vendors' tools group into interfaces: m_axi_* (AXI4, read only) and
s_axi_* (AXI4-Lite), with aclk and aresetn of both.
"""

from typing import Any

from amaranth import ClockDomain, ClockSignal, Module, ResetSignal
from amaranth.hdl import Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from nomatmul.hardware import registers
from nomatmul.hardware.board.axi import AxiReader, LiteBridge, LiteSignature, ReadAddress, read_data
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.top import Accelerator


class AxiTop(wiring.Component):
    """`ar`, `r`: the memory; `lite`: the host; ar*: what never changes."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "aclk": In(1),
                "aresetn": In(1),
                "ar": Out(stream.Signature(ReadAddress)),
                "r": In(stream.Signature(read_data(design.memory_bits))),
                "lite": In(LiteSignature()),
                "arsize": Out(3),
                "arburst": Out(2),
                "arcache": Out(4),
                "arprot": Out(3),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.domains.sync = ClockDomain("sync")
        m.d.comb += [ClockSignal("sync").eq(self.aclk), ResetSignal("sync").eq(~self.aresetn)]
        m.submodules.accelerator = accelerator = Accelerator(self.design)
        m.submodules.reader = reader = AxiReader(self.design.memory_bits)
        m.submodules.bridge = bridge = LiteBridge()
        connect(m, accelerator.memory, reader.port)
        connect(m, reader.ar, flipped(self.ar))
        connect(m, flipped(self.r), reader.r)
        connect(m, flipped(self.lite), bridge.lite)
        bus, target = bridge.bus, accelerator.bus
        chosen = bus.adr[registers.ADDRESS_BITS :] == 0
        m.d.comb += [
            self.arsize.eq(self.design.memory_bytes.bit_length() - 1),
            self.arburst.eq(0b01),  # incrementing
            self.arcache.eq(0b0011),  # as Vivado recommends: bufferable, modifiable
            self.arprot.eq(0),
            reader.base.eq(bridge.base),
            target.cyc.eq(bus.cyc & chosen),
            target.stb.eq(bus.stb & chosen),
            target.we.eq(bus.we),
            target.adr.eq(bus.adr),
            target.dat_w.eq(bus.dat_w),
            bus.ack.eq(target.ack & chosen),
            bus.dat_r.eq(target.dat_r),
        ]
        return m

    def ports(self) -> dict[str, Any]:
        """For `tools.verilog`: {name: (value, None)}; what is driven is an output."""
        lite = self.lite
        named = {
            "aclk": self.aclk,
            "aresetn": self.aresetn,
            "m_axi_araddr": self.ar.payload.addr,
            "m_axi_arlen": self.ar.payload.len,
            "m_axi_arsize": self.arsize,
            "m_axi_arburst": self.arburst,
            "m_axi_arcache": self.arcache,
            "m_axi_arprot": self.arprot,
            "m_axi_arvalid": self.ar.valid,
            "m_axi_arready": self.ar.ready,
            "m_axi_rdata": self.r.payload.data,
            "m_axi_rresp": self.r.payload.resp,
            "m_axi_rlast": self.r.payload.last,
            "m_axi_rvalid": self.r.valid,
            "m_axi_rready": self.r.ready,
            "s_axi_awaddr": lite.aw.payload,
            "s_axi_awvalid": lite.aw.valid,
            "s_axi_awready": lite.aw.ready,
            "s_axi_wdata": lite.w.payload,
            "s_axi_wvalid": lite.w.valid,
            "s_axi_wready": lite.w.ready,
            "s_axi_bresp": lite.b.payload,
            "s_axi_bvalid": lite.b.valid,
            "s_axi_bready": lite.b.ready,
            "s_axi_araddr": lite.ar.payload,
            "s_axi_arvalid": lite.ar.valid,
            "s_axi_arready": lite.ar.ready,
            "s_axi_rdata": lite.r.payload.data,
            "s_axi_rresp": lite.r.payload.resp,
            "s_axi_rvalid": lite.r.valid,
            "s_axi_rready": lite.r.ready,
        }
        return {name: (Value.cast(value), None) for name, value in named.items()}
