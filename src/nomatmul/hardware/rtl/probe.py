"""What a simulation sees of the accelerator: every write of every memory, and the instruction that
ended. None of it exists in a design without `probe`.
"""

from amaranth import Module, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import Out

from nomatmul.hardware import isa
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl import ports


def _event(**fields: object) -> wiring.Out:
    """Fields that count in the cycles in which `valid` is set."""
    return Out(wiring.Signature({"valid": Out(1), **{k: Out(v) for k, v in fields.items()}}))


class Probe(wiring.Signature):
    """Events, by memory. An instruction's writes come before its `retired`, or with it."""

    def __init__(self, design: Design) -> None:
        lanes = design.element_lanes
        groups = ports.groups_of(design.parameter_words, design)
        super().__init__(
            {
                "vector": _event(
                    address=range(design.vector_words), data=signed(design.vector_bits)
                ),
                "activation": _event(
                    address=range(design.activation_groups),
                    data=data.ArrayLayout(signed(8), lanes),
                ),
                "scalar": _event(address=range(isa.SCALARS), m=24, e=signed(10)),
                "parameter": _event(
                    address=range(groups),
                    mask=lanes,
                    data=data.ArrayLayout(signed(design.weight_bits), lanes),
                ),
                "state": _event(address=range(design.state_words), data=signed(design.state_bits)),
                "logit": _event(value=signed(design.vector_bits), last=1),
                "retired": _event(index=range(design.program_words)),
            }
        )


def copy(m: Module, event: object, source: object, *names: str) -> None:
    """Drive an event from a write port that calls its signals alike."""
    for name in ("valid", *names):
        m.d.comb += getattr(event, name).eq(getattr(source, name))
