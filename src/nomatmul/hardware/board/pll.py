"""The ECP5's phase-locked loop: dividers for a clock, and the primitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amaranth import Const, Instance, Signal

VCO_LEAST, VCO_MOST, VCO_BEST = 400e6, 800e6, 600e6


@dataclass(frozen=True)
class Dividers:
    """output = input / in_div * feedback; the oscillator runs at output * out_div."""

    in_div: int
    feedback: int
    out_div: int


def dividers(input_hz: float, output_hz: float) -> Dividers:
    """Dividers that make `output_hz` exactly. Raises ValueError where there are none."""
    for in_div in range(1, 6):
        feedback = output_hz * in_div / input_hz
        if abs(feedback - round(feedback)) > 1e-6 or not 1 <= round(feedback) <= 80:
            continue
        out_div = round(VCO_BEST / output_hz)
        if VCO_LEAST <= output_hz * out_div <= VCO_MOST:
            return Dividers(in_div, round(feedback), out_div)
    raise ValueError(
        f"{output_hz / 1e6:g} MHz cannot be made exactly of {input_hz / 1e6:g} MHz by this loop"
    )


def pll(input_hz: float, output_hz: float, clock_in: Any, clock_out: Signal, locked: Signal) -> Any:
    """The EHXPLLL that makes `clock_out`; `locked` rises when it is stable."""
    by = dividers(input_hz, output_hz)
    zero, one = Const(0, 1), Const(1, 1)
    return Instance(
        "EHXPLLL",
        a_FREQUENCY_PIN_CLKI=f"{input_hz / 1e6:g}",
        a_FREQUENCY_PIN_CLKOP=f"{output_hz / 1e6:g}",
        a_ICP_CURRENT="12",
        a_LPF_RESISTOR="8",
        p_PLLRST_ENA="DISABLED",
        p_INTFB_WAKE="DISABLED",
        p_STDBY_ENABLE="DISABLED",
        p_DPHASE_SOURCE="DISABLED",
        p_OUTDIVIDER_MUXA="DIVA",
        p_CLKOP_ENABLE="ENABLED",
        p_CLKI_DIV=by.in_div,
        p_CLKFB_DIV=by.feedback,
        p_CLKOP_DIV=by.out_div,
        p_CLKOP_CPHASE=by.out_div // 2 - 1,
        p_CLKOP_FPHASE=0,
        p_FEEDBK_PATH="CLKOP",
        i_CLKI=clock_in,
        i_CLKFB=clock_out,
        i_RST=zero,
        i_STDBY=zero,
        i_PHASESEL0=zero,
        i_PHASESEL1=zero,
        i_PHASEDIR=one,
        i_PHASESTEP=one,
        i_PHASELOADREG=one,
        i_PLLWAKESYNC=zero,
        i_ENCLKOP=zero,
        o_CLKOP=clock_out,
        o_LOCK=locked,
    )
