"""Sigmoid, silu and the recurrence against the reference, for several widths."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nomatmul.hardware.compile import formats_of
from nomatmul.hardware.design import Design
from nomatmul.hardware.rtl.functions import Sigmoid, Silu
from nomatmul.hardware.rtl.recurrence import Recurrence
from nomatmul.reference.integer import gates, table
from nomatmul.reference.integer.numerics import saturate, shift_rounded
from tests.hardware.pipelines import through

RNG = random.Random(11)
WIDTHS = [
    {},
    {"vector_bits": 18, "vector_fraction": 10, "state_bits": 18, "state_fraction": 10},
    {"vector_fraction": 8, "state_fraction": 15, "table_bits": 7, "state_bits": 22},
    {"vector_bits": 32, "vector_fraction": 16, "state_bits": 32, "state_fraction": 20},
]


def inputs_of(design: Design, count: int) -> list[int]:
    """z at both ends, around 0, around +-16 and around steps of the table; then random."""
    bits, fraction = design.vector_bits, design.vector_fraction
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    marks = [0, 16 << fraction, (16 << fraction) >> design.table_bits, 1 << fraction]
    near = [sign * mark + off for mark in marks for sign in (1, -1) for off in (-1, 0, 1)]
    values = [least, least + 1, most, *near]
    values += [RNG.randint(least, most) >> RNG.randrange(bits) for _ in range(count)]
    return [value for value in values if least <= value <= most]


@pytest.mark.parametrize("widths", WIDTHS)
def test_sigmoid_and_silu_equal_the_reference(widths: dict[str, int]) -> None:
    design = Design(lanes=32, **widths)
    formats, values = formats_of(design), inputs_of(design, 400)
    z = np.array(values)
    unit = Sigmoid(design)
    got = through(unit, unit.latency, [{"z": value} for value in values], ["sigma"])
    assert [s for (s,) in got] == table.sigmoid(z, formats).tolist()
    silu = Silu(design)
    outputs = ["silu", "same_z", "sigma"]
    got = through(silu, silu.latency, [{"z": value} for value in values], outputs)
    expected = (table.silu(z, formats), z, table.sigmoid(z, formats))
    assert got == [tuple(row) for row in np.stack(expected, axis=1).tolist()]


@pytest.mark.parametrize("widths", WIDTHS)
def test_recurrence_equals_the_reference(widths: dict[str, int]) -> None:
    design = Design(lanes=32, **widths)
    formats = formats_of(design)
    unit = Recurrence(design)
    least, most = -(1 << (design.state_bits - 1)), (1 << (design.state_bits - 1)) - 1
    zf, zi = inputs_of(design, 300), inputs_of(design, 300)
    RNG.shuffle(zi)
    count = len(zf)
    h = [RNG.choice([least, most, 0, RNG.randint(least, most)]) for _ in range(count)]
    bound = [RNG.choice([0, 0, 65535, 1, RNG.randrange(65536)]) for _ in range(count)]
    sigma = table.sigmoid(np.array(zf), formats)
    entering = table.silu(np.array(zi), formats)
    rows = zip(sigma.tolist(), entering.tolist(), h, bound, strict=True)
    inputs = [dict(zip(("sigma", "entering", "h", "bound"), row, strict=True)) for row in rows]
    got = through(unit, unit.latency, inputs, ["next_h", "z"])
    f = gates.forget_gate(np.array(zf), np.array(bound), formats)
    state = gates.next_state(f, np.array(zi), np.array(h), formats)
    extra = design.state_fraction - design.vector_fraction
    z = saturate(shift_rounded(state, extra), design.vector_bits)
    assert got == list(zip(state.tolist(), z.tolist(), strict=True))
