"""Scalars of integer inference against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.reference.integer import scalar
from nomatmul.reference.integer.scalar import Scalar

LEAST, MOST = 1 << 23, (1 << 24) - 1
MANTISSAS = st.one_of(st.integers(LEAST, MOST), st.sampled_from([LEAST, LEAST + 1, MOST - 1, MOST]))
SCALARS = st.one_of(st.tuples(MANTISSAS, st.integers(-120, 120)), st.just((0, 0)))
INTEGERS = st.one_of(
    st.integers(0, (1 << 62) - 1),
    st.integers(0, 62).map(lambda bits: (1 << bits) - 1),
    st.integers(0, 61).map(lambda bits: 1 << bits),
)


def of(pair: tuple[int, int]) -> Scalar:
    return Scalar(*(np.array(part, np.int64) for part in pair))


def exact(value: Scalar) -> Fraction:
    return Fraction(int(value.m)) * Fraction(2) ** int(value.e)


def truncated(value: Fraction) -> tuple[int, int]:
    """(m, e) of the largest scalar that is not above `value`."""
    if value == 0:
        return 0, 0
    e = math.floor(math.log2(value)) - 23
    while value >= Fraction(2) ** (e + 24):
        e += 1
    while value < Fraction(2) ** (e + 23):
        e -= 1
    return math.floor(value / Fraction(2) ** e), e


def pair(value: Scalar) -> tuple[int, int]:
    return int(value.m), int(value.e)


@given(INTEGERS)
def test_an_integer_is_cut_to_24_bits(n):
    assert pair(scalar.from_int(np.array(n))) == truncated(Fraction(n))
    assert int(scalar.bit_length(np.array(n))) == n.bit_length()


@given(SCALARS, SCALARS)
def test_products_and_quotients_are_the_exact_ones_truncated(a, b):
    x, y = of(a), of(b)
    assert pair(scalar.mul(x, y)) == truncated(exact(x) * exact(y))
    quotient = exact(x) / exact(y) if b[0] else Fraction(0)
    assert pair(scalar.div(x, y)) == truncated(quotient)


@given(SCALARS, SCALARS)
def test_a_sum_cuts_the_smaller_one_to_the_unit_of_the_larger(a, b):
    x, y = sorted((of(a), of(b)), key=exact)
    unit = Fraction(2) ** int(y.e)
    expected = exact(y) + math.floor(exact(x) / unit) * unit
    assert pair(scalar.add(x, y)) == pair(scalar.add(y, x)) == truncated(expected)


@given(SCALARS)
def test_a_root_is_the_exact_one_truncated(a):
    m, e = pair(scalar.sqrt(of(a)))
    if a[0] == 0:
        assert (m, e) == (0, 0)
        return
    assert LEAST <= m <= MOST
    unit = Fraction(2) ** e
    assert (m * unit) ** 2 <= exact(of(a)) < ((m + 1) * unit) ** 2


@given(st.floats(1e-30, 1e30))
def test_a_constant_is_the_nearest_scalar(value):
    m, e = pair(Scalar.of(value))
    assert LEAST <= m <= MOST
    assert abs(Fraction(value) - exact(of((m, e)))) <= Fraction(2) ** e / 2


def test_constants_of_arrays_round_up_into_the_next_exponent():
    made = Scalar.of([0.0, 1.0, 1.0 - 2.0**-26])
    assert made.array().tolist() == [[0, 0], [LEAST, -23], [LEAST, -23]]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e200, 1e-200])
def test_a_constant_that_no_scalar_can_be_is_refused(value):
    with pytest.raises(ValueError, match=r"a constant of the integer model is"):
        Scalar.of(value)


def test_exponents_saturate():
    largest, least = of((MOST, 511)), of((LEAST, -512))
    assert pair(scalar.mul(largest, largest)) == ((MOST * MOST) >> 24, 511)
    assert pair(scalar.mul(least, least)) == (LEAST, -512)
    assert pair(scalar.div(least, largest))[1] == -512


@given(SCALARS)
def test_the_upper_18_bits(a):
    m, e = scalar.top18(of(a))
    assert m == a[0] >> 6
    assert e == a[1] + 6


def test_arrays_are_computed_element_by_element(rng):
    m = rng.integers(LEAST, MOST, (2, 3, 50))
    e = rng.integers(-90, 90, (2, 3, 50))
    m[0, 0, :5], e[0, 0, :5] = 0, 0
    a, b = Scalar(m, e), Scalar(m[::-1], e[::-1])
    for operation in (scalar.mul, scalar.add, scalar.div):
        whole = operation(a, b).array()
        each = [
            operation(of((m[i], e[i])), of((b.m[i], b.e[i]))).array() for i in np.ndindex(m.shape)
        ]
        assert np.array_equal(whole.reshape(-1, 2), each)
