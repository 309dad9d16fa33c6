"""The top level for boards with AXI: the accelerator between a memory and a processor.

Ports are named as vendors' tools group them into interfaces: m_axi_* (AXI4, read only) and s_axi_*
(AXI4-Lite, 32 bits), with aclk and aresetn of both.
"""

from typing import Any

from amaranth import ClockDomain, ClockSignal, Module, ResetSignal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect

from nomatmul.hardware import registers
from nomatmul.hardware.board.axi import (
    AXI_ADDRESS_BITS,
    LITE_ADDRESS_BITS,
    AxiReader,
    LiteBridge,
)
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.top import Accelerator


class AxiTop(wiring.Component):
    """See the module; everything runs at `aclk`."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__(
            {
                "aclk": In(1),
                "aresetn": In(1),
                "m_axi_araddr": Out(AXI_ADDRESS_BITS),
                "m_axi_arlen": Out(8),
                "m_axi_arsize": Out(3),
                "m_axi_arburst": Out(2),
                "m_axi_arcache": Out(4),
                "m_axi_arprot": Out(3),
                "m_axi_arvalid": Out(1),
                "m_axi_arready": In(1),
                "m_axi_rdata": In(design.memory_bits),
                "m_axi_rresp": In(2),
                "m_axi_rlast": In(1),
                "m_axi_rvalid": In(1),
                "m_axi_rready": Out(1),
                "s_axi_awaddr": In(LITE_ADDRESS_BITS),
                "s_axi_awvalid": In(1),
                "s_axi_awready": Out(1),
                "s_axi_wdata": In(32),
                "s_axi_wstrb": In(4),  # not heeded: every write is a whole word
                "s_axi_wvalid": In(1),
                "s_axi_wready": Out(1),
                "s_axi_bresp": Out(2),
                "s_axi_bvalid": Out(1),
                "s_axi_bready": In(1),
                "s_axi_araddr": In(LITE_ADDRESS_BITS),
                "s_axi_arvalid": In(1),
                "s_axi_arready": Out(1),
                "s_axi_rdata": Out(32),
                "s_axi_rresp": Out(2),
                "s_axi_rvalid": Out(1),
                "s_axi_rready": In(1),
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
        bus, target = bridge.bus, accelerator.bus
        chosen = bus.adr[registers.ADDRESS_BITS :] == 0
        m.d.comb += [
            reader.base.eq(bridge.base),
            target.cyc.eq(bus.cyc & chosen),
            target.stb.eq(bus.stb & chosen),
            target.we.eq(bus.we),
            target.adr.eq(bus.adr),
            target.dat_w.eq(bus.dat_w),
            bus.ack.eq(target.ack & chosen),
            bus.dat_r.eq(target.dat_r),
        ]
        self._memory_pins(m, reader)
        self._host_pins(m, bridge)
        return m

    def _memory_pins(self, m: Module, reader: AxiReader) -> None:
        ar, r = reader.ar, reader.r
        m.d.comb += [
            self.m_axi_araddr.eq(ar.payload.addr),
            self.m_axi_arlen.eq(ar.payload.len),
            self.m_axi_arsize.eq(self.design.memory_bytes.bit_length() - 1),
            self.m_axi_arburst.eq(0b01),  # incrementing
            self.m_axi_arcache.eq(0b0011),  # bufferable and modifiable, as Vivado recommends
            self.m_axi_arprot.eq(0),
            self.m_axi_arvalid.eq(ar.valid),
            ar.ready.eq(self.m_axi_arready),
            r.payload.data.eq(self.m_axi_rdata),
            r.payload.resp.eq(self.m_axi_rresp),
            r.payload.last.eq(self.m_axi_rlast),
            r.valid.eq(self.m_axi_rvalid),
            self.m_axi_rready.eq(r.ready),
        ]

    def _host_pins(self, m: Module, bridge: LiteBridge) -> None:
        lite = bridge.lite
        for name, channel in (("aw", lite.aw), ("w", lite.w), ("ar", lite.ar)):
            m.d.comb += [
                channel.valid.eq(getattr(self, f"s_axi_{name}valid")),
                getattr(self, f"s_axi_{name}ready").eq(channel.ready),
            ]
        m.d.comb += [
            lite.aw.payload.eq(self.s_axi_awaddr),
            lite.w.payload.eq(self.s_axi_wdata),
            lite.ar.payload.eq(self.s_axi_araddr),
            self.s_axi_bresp.eq(lite.b.payload),
            self.s_axi_bvalid.eq(lite.b.valid),
            lite.b.ready.eq(self.s_axi_bready),
            self.s_axi_rdata.eq(lite.r.payload.data),
            self.s_axi_rresp.eq(lite.r.payload.resp),
            self.s_axi_rvalid.eq(lite.r.valid),
            lite.r.ready.eq(self.s_axi_rready),
        ]

    def ports(self) -> dict[str, Any]:
        """For `tools.verilog`: {name: (value, None)}; what is driven is an output."""
        return {name: (getattr(self, name), None) for name in self.signature.members}
