"""The rescaler and the rounding shift against the reference, at every shift and both ends."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nomatmul.hardware.rtl.pipeline import Multiplier
from nomatmul.hardware.rtl.rescale import Factor, Rescale, RoundingShift
from nomatmul.reference.integer.scalar import Scalar
from nomatmul.reference.integer.vector import rescale
from tests.hardware.pipelines import through

RNG = random.Random(7)


def signed_cases(bits: int, count: int) -> list[int]:
    """Extremes, small numbers, and random ones of every size."""
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    fixed = [0, 1, -1, 2, -2, least, most, least + 1, most - 1]
    return fixed + [
        RNG.randint(least, most) >> RNG.randrange(bits) for _ in range(count - len(fixed))
    ]


@pytest.mark.parametrize(("a_bits", "b_bits"), [(24, 24), (18, 18), (26, 18), (32, 32), (47, 18)])
def test_multiplier_is_exact(a_bits: int, b_bits: int) -> None:
    unit = Multiplier(a_bits, b_bits)
    pairs = list(zip(signed_cases(a_bits, 120), reversed(signed_cases(b_bits, 120)), strict=True))
    pairs += [(-(1 << (a_bits - 1)), -(1 << (b_bits - 1)))]
    got = through(unit, unit.latency, [{"a": a, "b": b} for a, b in pairs], ["product"])
    assert [value for (value,) in got] == [a * b for a, b in pairs]


@pytest.mark.parametrize(("bits", "result_bits"), [(48, 24), (33, 16), (64, 32)])
def test_rounding_shift_at_every_distance(bits: int, result_bits: int) -> None:
    unit = RoundingShift(bits, result_bits, 6)
    cases = [
        (value, shift)
        for shift in range(64)
        for value in [*signed_cases(bits, 14), (1 << shift) // 2, -(1 << shift) // 2]
        if -(1 << (bits - 1)) <= value < 1 << (bits - 1)
    ]
    # values on both sides of where saturation begins
    for shift in range(bits - result_bits + 1):
        edge = (1 << (result_bits - 1 + shift)) - ((1 << shift) >> 1)
        for value in (edge, edge - 1, -edge, -edge - 1, -edge - (1 << shift)):
            if -(1 << (bits - 1)) <= value < 1 << (bits - 1):
                cases.append((value, shift))
    got = through(
        unit, unit.latency, [{"value": v, "shift": s} for v, s in cases], ["result", "saturated"]
    )
    for (value, shift), (result, saturated) in zip(cases, got, strict=True):
        exact = (value + ((1 << shift) >> 1)) >> shift
        clamped = max(-(1 << (result_bits - 1)), min((1 << (result_bits - 1)) - 1, exact))
        assert (result, saturated) == (clamped, exact != clamped), (value, shift)


@pytest.mark.parametrize(("sum_bits", "result_bits"), [(24, 24), (12, 16), (32, 32), (20, 18)])
def test_rescale_equals_the_reference(sum_bits: int, result_bits: int) -> None:
    unit = Rescale(sum_bits, result_bits)
    factor_unit = Factor(result_bits, unit.shift_bits, 8)
    # right shifts s = -(e + 6 + F), from far left to further than anything reaches
    rights = [-700, -40, -32, -31, -14, -9, -8, -7, -6, -5, -1, 0, 1, 2, 7, 17, 18, 30, 41, 42]
    rights += [43, 50, 51, 61, 62, 63, 64, 70, 100, 127, 128, 500]
    cases = []
    for right in rights:
        for acc in [*signed_cases(sum_bits, 16), 31, 63, 64, -64, -63]:
            m = RNG.choice([0, 1 << 23, (1 << 24) - 1, RNG.randrange(1 << 23, 1 << 24)])
            fraction = RNG.choice([-128, 127, 12, 0, RNG.randint(-128, 127)])
            e = max(-512, min(511, -right - 6 - fraction)) if m else 0
            cases.append((acc, m, e, fraction))
    shifts = through(
        factor_unit,
        Factor.latency,
        [{"e": e, "fraction": f} for _, _, e, f in cases],
        ["shift", "beyond"],
    )
    inputs = [
        {"sum": acc, "factor": m >> 6, "shift": shift, "beyond": beyond}
        for (acc, m, _, _), (shift, beyond) in zip(cases, shifts, strict=True)
    ]
    got = through(unit, unit.latency, inputs, ["result", "saturated"])
    for (acc, m, e, fraction), (result, saturated) in zip(cases, got, strict=True):
        scalar = Scalar(np.array(m), np.array(e))
        expected = int(rescale(np.array([acc]), scalar, fraction, result_bits)[0])
        assert result == expected, (acc, m, e, fraction)
        right = -(e + 6 + fraction)
        exact = exact_rescale(acc * (m >> 6), right)
        assert saturated == (exact != expected), (acc, m, e, fraction)


def exact_rescale(product: int, right: int) -> int:
    if right <= 0:
        return product << min(-right, 31)
    return (product + (1 << (right - 1))) >> right
