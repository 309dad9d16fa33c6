"""The top level for a ULX3S (v2 and v3) with an LFE5U-85F: clock, reset, pins.

25 MHz become the design's clock in a PLL. The SDRAM gets that clock inverted, so its commands and
data are in the middle of its eye; every SDRAM pin has a register in its pad, there and back, which
makes the timing at the pins independent of place and route. No board was at hand: what is tested
is the logic behind the pads, against a model of the chip.
"""

from typing import Any

from amaranth import ClockDomain, ClockSignal, Const, Instance, Module, Signal
from amaranth.hdl import IOPort
from amaranth.lib import wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

from nomatmul.hardware.board.pll import dividers, pll
from nomatmul.hardware.board.sdram_chip import CHIPS
from nomatmul.hardware.board.serial_core import SerialCore
from nomatmul.hardware.design import Design

INPUT_HZ = 25e6
CLOCK_HZ = 62.5e6  # below what placement estimates for 256 lanes (docs/hardware.md)
CHIP = CHIPS["ulx3s-32mb"]
BAUD = 2_000_000
IO_STAGES = 2  # a register in each pad: out and in
# Memories that are large enough for the model in the box. A design's defaults fit the chip too, but
# leave too few of its block RAMs free for a placement with short wires.
# A memory word of 64 bits is as much as 16 bits a cycle ask for: a beat of 512 takes eight of them,
# and what is prefetched while nothing is taken drains four times faster than it comes.
MEMORIES = {
    "vector_words": 8192,
    "parameter_words": 8192,
    "state_words": 8192,
    "memory_bits": 64,
    "burst": 128,
    "fifo_words": 2048,
}

# Pins of the package CABGA381 by port; one site a bit, bit 0 first. Sites are those of the board's
# schematics, v3.0.x.
PINS: dict[str, tuple[str, ...]] = {
    "clk_25mhz": ("G2",),
    "ftdi_rxd": ("L4",),  # the FPGA sends
    "ftdi_txd": ("M1",),  # the FPGA receives
    "btn_pwr_n": ("D6",),
    "wifi_gpio0": ("L2",),  # held high, so that the ESP32 leaves the board alone
    "led": ("B2", "C2", "C1", "D2", "D1", "E2", "E1", "H3"),
    "sdram_clk": ("F19",),
    "sdram_cke": ("F20",),
    "sdram_csn": ("P20",),
    "sdram_rasn": ("R20",),
    "sdram_casn": ("T19",),
    "sdram_wen": ("T20",),
    "sdram_ba": ("P19", "N20"),
    "sdram_dqm": ("U19", "E20"),
    "sdram_a": (
        "M20", "M19", "L20", "L19", "K20", "K19", "K18", "J20", "J19", "H20", "N19", "G20", "G19",
    ),
    "sdram_d": (
        "J16", "L18", "M18", "N18", "P18", "T18", "T17", "U20",
        "E19", "D20", "D19", "C20", "E18", "F18", "J18", "J17",
    ),
}  # fmt: skip
_DRIVE = {"sdram": 4, "led": 4, "ftdi_rxd": 4, "wifi_gpio0": 4}
_PULL = {"ftdi_txd": "UP", "btn_pwr_n": "UP"}


def constraints() -> str:
    """The .lpf of the pins above."""
    text = [
        "BLOCK RESETPATHS;",
        "BLOCK ASYNCPATHS;",
        f'FREQUENCY PORT "clk_25mhz" {INPUT_HZ / 1e6:g} MHZ;',
        "SYSCONFIG CONFIG_IOVOLTAGE=3.3 COMPRESS_CONFIG=ON MCCLK_FREQ=62 MASTER_SPI_PORT=DISABLE"
        " SLAVE_SPI_PORT=DISABLE SLAVE_PARALLEL_PORT=DISABLE;",
    ]
    for name, sites in PINS.items():
        for bit, site in enumerate(sites):
            port = name if len(sites) == 1 else f"{name}[{bit}]"
            drive = next((f" DRIVE={d}" for key, d in _DRIVE.items() if name.startswith(key)), "")
            slew = " SLEWRATE=FAST" if name.startswith("sdram") else ""
            text.append(f'LOCATE COMP "{port}" SITE "{site}";')
            text.append(
                f'IOBUF PORT "{port}" PULLMODE={_PULL.get(name, "NONE")} IO_TYPE=LVCMOS33'
                f"{drive}{slew};"
            )
    return "\n".join(text) + "\n"


class Ulx3s(wiring.Component):
    """Ports are named like PINS; `sdram_d` is an IOPort of its own. Raises ValueError for a clock
    that the PLL, the SDRAM or the serial line cannot have."""

    def __init__(self, design: Design, clock_hz: float = CLOCK_HZ, baud: int = BAUD) -> None:
        dividers(INPUT_HZ, clock_hz)
        self.clock_hz = clock_hz
        self.core = SerialCore(design, CHIP, clock_hz, baud, io_stages=IO_STAGES)
        self.sdram_d = IOPort(len(PINS["sdram_d"]), name="sdram_d")
        inputs = ("clk_25mhz", "ftdi_txd", "btn_pwr_n")
        super().__init__(
            {
                name: In(len(sites)) if name in inputs else Out(len(sites))
                for name, sites in PINS.items()
                if name != "sdram_d"
            }
        )

    def ports(self) -> dict[str, Any]:
        """For `tools.verilog`: {name: (value, None)}; what is driven is an output."""
        found = {name: (getattr(self, name), None) for name in self.signature.members}
        return found | {"sdram_d": (self.sdram_d, None)}

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        # without a reset: the core's parts have each their own
        m.domains.sync = ClockDomain("sync", reset_less=True)
        clock, locked = Signal(), Signal()
        m.submodules.pll = pll(INPUT_HZ, self.clock_hz, self.clk_25mhz, clock, locked)
        m.d.comb += ClockSignal("sync").eq(clock)
        m.submodules.core = core = self.core
        m.submodules.reset = FFSynchronizer(~locked | ~self.btn_pwr_n, core.reset, init=1, stages=4)
        m.d.comb += [
            core.rx.eq(self.ftdi_txd),
            self.ftdi_rxd.eq(core.tx),
            self.wifi_gpio0.eq(1),
            self.led.eq(core.lights),
        ]
        self._sdram(m)
        return m

    def _sdram(self, m: Module) -> None:
        pins = self.core.pins
        command = pins.command.as_value()
        # low then high: the SDRAM's clock is the inverse of ours
        m.submodules.sdram_clock = Instance(
            "ODDRX1F",
            i_SCLK=ClockSignal("sync"),
            i_RST=Const(0, 1),
            i_D0=Const(0, 1),
            i_D1=Const(1, 1),
            o_Q=self.sdram_clk,
        )
        outputs = [
            (self.sdram_cke, pins.cke),
            (self.sdram_csn, ~pins.cs),
            (self.sdram_rasn, ~command[0]),
            (self.sdram_casn, ~command[1]),
            (self.sdram_wen, ~command[2]),
            (self.sdram_ba, pins.ba),
            (self.sdram_dqm, pins.dqm),
            (self.sdram_a, pins.a),
        ]
        for pad, value in outputs:
            for bit in range(len(pad)):
                name = f"{pad.name}_{bit}"
                m.submodules[name] = _pad_register(_SET, value[bit], pad[bit])
        for bit in range(len(self.sdram_d)):
            out, drive, back = Signal(), Signal(), Signal()
            m.submodules += [
                _pad_register(_CLEARED, pins.dq_o[bit], out),
                _pad_register(_SET, ~pins.dq_oe, drive),
                _pad_register(_INPUT, back, pins.dq_i[bit]),
                Instance("BB", i_I=out, i_T=drive, o_O=back, io_B=self.sdram_d[bit]),
            ]


# primitive, and its set or reset: before the first clock nothing is commanded or driven
_SET, _CLEARED, _INPUT = ("OFS1P3BX", "PD"), ("OFS1P3DX", "CD"), ("IFS1P3DX", "CD")


def _pad_register(kind: tuple[str, str], value: Any, output: Any) -> Any:
    """A register that lies in the pad."""
    primitive, clear = kind
    return Instance(
        primitive,
        ("i", clear, Const(0, 1)),
        i_SCLK=ClockSignal("sync"),
        i_SP=Const(1, 1),
        i_D=value,
        o_Q=output,
    )
