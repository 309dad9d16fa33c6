"""An ESTIMATE of energy: counted events times stated picojoules, memory and static parts apart.

Nothing here was measured on a chip. Events are counted in simulation or computed from a program;
what one event costs is taken from the literature or assumed, and `sensitivity` says what becomes
of the result when any one of these figures is half or twice as large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

PICO = 1e-12


@dataclass(frozen=True)
class Picojoules:
    """Energy of one event in a 40 nm FPGA at 1.1 V (a board's `logic_scale` is multiplied on).

    toggle: one bit of a routed signal changes. register: one register, one clock. block_ram: one
    access of 36 bits. dsp: one 18x18 product. memory: one bit from external memory.
    """

    toggle: float = 0.7
    register: float = 0.06
    block_ram: float = 8.0
    dsp: float = 5.0
    memory: float = 70.0


SOURCES = {
    "toggle": "assumed: C V^2 / 2 with 1.2 pF for a routed net of a 40 nm FPGA at 1.1 V",
    "register": "assumed: 0.1 pF of clock network and register, charged once a cycle at 1.1 V",
    "block_ram": "Horowitz, ISSCC 2014 (45 nm: 10 pJ for 64 bits of 8 KB), scaled to 36 bits of"
    " 2.25 KB, and doubled for the block's registers and routing",
    "dsp": "Horowitz, ISSCC 2014 (45 nm: 3.1 pJ for a 32-bit product), scaled to 18 bits, and"
    " four times that for pipeline and routing",
    "memory": "by type, see MEMORY_SOURCES",
}

# external memory: device, interface and controller, pJ a bit
MEMORY_PJ_PER_BIT = {"sdr": 150.0, "ddr3": 70.0, "ddr4": 30.0, "hbm2": 5.0}
MEMORY_SOURCES = {
    "sdr": "assumed from data sheets of 3.3 V SDR x16: about 75 mA above standby in a burst at"
    " 100 MHz, that is 0.25 W for 1.6 Gbit/s",
    "ddr3": "Malladi et al., ISCA 2012: DDR3 at full bandwidth about 70 pJ/bit",
    "ddr4": "assumed: between DDR3's 70 and the 20 to 40 pJ/bit of Horowitz, ISSCC 2014",
    "hbm2": "O'Connor et al., MICRO 2017: HBM2 3.92 pJ/bit, with a controller's share added",
}


@dataclass(frozen=True)
class Events:
    """What a token causes: toggled bits, cycles x registers, accesses, products, bits of memory;
    and the seconds that it takes."""

    toggles: float
    register_clocks: float
    block_ram_accesses: float
    dsp_products: float
    memory_bits: float
    seconds: float


@dataclass(frozen=True)
class Energy:
    """Joules a token by part."""

    logic: float
    clock: float
    block_ram: float
    dsp: float
    memory: float
    static: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def energy(events: Events, cost: Picojoules, static_watts: float, logic_scale: float) -> Energy:
    """Joules a token. static_watts covers everything that is drawn without switching."""
    chip = PICO * logic_scale
    return Energy(
        events.toggles * cost.toggle * chip,
        events.register_clocks * cost.register * chip,
        events.block_ram_accesses * cost.block_ram * chip,
        events.dsp_products * cost.dsp * chip,
        events.memory_bits * cost.memory * PICO,
        static_watts * events.seconds,
    )


def sensitivity(
    events: Events, cost: Picojoules, static_watts: float, logic_scale: float
) -> dict[str, tuple[float, float]]:
    """{figure: tokens a joule with half of it, and with twice}; "static" is the board's watts."""
    found: dict[str, tuple[float, float]] = {}
    for field in dataclasses.fields(cost):
        values: Mapping[float, float] = {
            factor: 1 / energy(events, _with(cost, field.name, factor), static_watts,
                               logic_scale).total
            for factor in (0.5, 2.0)
        }  # fmt: skip
        found[field.name] = values[0.5], values[2.0]
    half, twice = (
        1 / energy(events, cost, static_watts * factor, logic_scale).total for factor in (0.5, 2.0)
    )
    found["static"] = half, twice
    return found


def _with(cost: Picojoules, name: str, factor: float) -> Picojoules:
    return dataclasses.replace(cost, **{name: getattr(cost, name) * factor})
