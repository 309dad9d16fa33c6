"""Vectors, the table and the gates of integer inference against Python's own integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.reference.integer import Formats, gates, table, vector
from nomatmul.reference.integer.scalar import Scalar, div, from_int

F = Formats()
WIDE = Formats(state_fraction=16)
LARGEST = Scalar.of(127.0)
X_LEAST, X_MOST, W_MOST, SUM_MOST = -(1 << 23), (1 << 23) - 1, (1 << 15) - 1, (1 << 23) - 1


def ints(least: int, most: int) -> st.SearchStrategy[int]:
    """Awkward ones among them."""
    edges = [n for n in (least, least + 1, -1, 0, 1, most - 1, most) if least <= n <= most]
    small = st.integers(max(least, -40), min(most, 40))
    return st.one_of(st.integers(least, most), st.sampled_from(edges), small)


VECTORS = st.lists(st.tuples(ints(X_LEAST, X_MOST), ints(-W_MOST, W_MOST)), min_size=1, max_size=9)


def clamp(value: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min((1 << (bits - 1)) - 1, value))


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def split(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    x, w = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    return x, w, [a * b for a, b in pairs]


@given(VECTORS)
def test_scans_and_sums_of_squares(pairs):
    x, w, products = split(pairs)
    a = vector.scan(x, w)
    largest = max(map(abs, products))
    assert np.array_equal(a.array(), from_int(np.array(largest)).array())
    right = int(a.e) + 8
    cut = [math.floor(p / power(right)) for p in products]
    assert max(map(abs, cut)) <= 1 << 16
    total = vector.sumsq(x, w, a)
    if largest == 0:
        assert total.array().tolist() == [0, 0]
        return
    n, e = int(total.m), int(total.e)
    exact = sum(c * c for c in cut)
    assert n * power(e - 2 * right) <= exact < (n + 1) * power(e - 2 * right)


@given(VECTORS)
def test_the_quantiser_divides_by_the_largest(pairs):
    x, w, products = split(pairs)
    a = vector.scan(x, w)
    r = div(LARGEST, a)
    q = vector.quantise(x, w, a, r).tolist()
    largest = max(map(abs, products))
    if largest == 0:
        assert q == [0] * len(q)
        return
    right, inverse = int(a.e) + 8, int(r.m) >> 6
    f = -(int(r.e) + 6 + right)
    assert f in (26, 27)
    for p, got in zip(products, q, strict=True):
        u = math.floor(p / power(right))
        assert got == max(-127, min(127, half_up(Fraction(u * inverse, 1 << f))))
        # bounds.py counts on no more than this
        assert abs(got - Fraction(127 * p, largest)) <= Fraction(506, 1000)
    assert max(map(abs, q)) == 127


@pytest.mark.parametrize("bits", [16, 24, 30])
@given(acc=ints(-SUM_MOST, SUM_MOST), m=st.integers(1 << 23, (1 << 24) - 1), e=ints(-110, 40))
def test_rescaling_rounds_and_saturates(bits, acc, m, e):
    factor = Scalar(np.array(m), np.array(e))
    fraction = 12
    got = vector.rescale(np.array([acc]), factor, fraction, bits).tolist()
    right = -(e + 6 + fraction)
    product = Fraction(acc * (m >> 6))
    if right > 62:
        assert got == [0]
    else:
        expected = (
            half_up(product / power(right)) if right > 0 else product * power(min(-right, 31))
        )
        assert got == [clamp(int(expected), bits)]


def test_rescaling_by_zero_is_zero():
    zero = Scalar(np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert not vector.rescale(np.array([[5], [-5]]), zero, 12, 24).any()


def test_leading_axes_are_tokens(rng):
    x, w = rng.integers(X_LEAST, X_MOST, (2, 3, 20)), rng.integers(-W_MOST, W_MOST, 20)
    x[1, 2] = 0
    a = vector.scan(x, w)
    r = div(LARGEST, a)
    whole = (vector.sumsq(x, w, a).array(), vector.quantise(x, w, a, r))
    for at in np.ndindex(2, 3):
        one, inverse = (Scalar(s.m[at], s.e[at]) for s in (a, r))
        assert np.array_equal(whole[0][at], vector.sumsq(x[at], w, one).array())
        assert np.array_equal(whole[1][at], vector.quantise(x[at], w, one, inverse))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def test_the_table_is_close_to_the_sigmoid():
    z = np.arange(-(20 << 12), 20 << 12)
    got = table.sigmoid(z, F) / 65536
    # half a unit of an entry, half of an interpolation, and a chord's (1/32)^2 / 8 * max |sigma''|
    chord = (1 / 32) ** 2 / 8 * 0.0963
    assert np.abs(got - sigmoid(z / 4096)).max() <= 2.0**-16 + chord
    assert np.all(np.diff(got) >= 0)
    assert np.array_equal(got[1:] + got[:0:-1], np.ones(len(z) - 1))
    real = z / 4096
    off = np.abs(table.silu(z, F) / 4096 - real * sigmoid(real))
    assert off.max() <= 2.0**-13 + 20 * (2.0**-16 + chord)


@pytest.mark.parametrize("bits", [5, 9, 12])
def test_more_steps_are_closer(bits):
    formats = Formats(table_bits=bits)
    z = np.arange(-(8 << 12), 8 << 12, 7)
    step = 2.0 ** (4 - bits)
    off = np.abs(table.sigmoid(z, formats) / 65536 - sigmoid(z / 4096)).max()
    assert off <= step**2 / 8 * 0.0963 + 2.0**-16
    assert len(table.sigmoid_table(bits)) == 2**bits + 1


@pytest.mark.parametrize(
    ("z", "expected"),
    [(0, 1 << 15), (X_MOST, 1 << 16), (X_LEAST, 0), (16 << 12, 1 << 16), (-(16 << 12), 0)],
)
def test_sigmoids_at_the_ends(z, expected):
    assert int(table.sigmoid(np.array(z), F)) == expected


@given(z=ints(X_LEAST, X_MOST))
def test_a_sigmoid_lies_on_the_line_between_two_entries(z):
    entries = table.sigmoid_table(9).tolist()
    size = min(abs(z), (1 << 16) - 1)
    at, rest = divmod(size, 128)
    value = entries[at] + half_up(Fraction((entries[at + 1] - entries[at]) * rest, 128))
    assert int(table.sigmoid(np.array(z), F)) == (value if z >= 0 else 65536 - value)


NUMBERS = ints(X_LEAST, X_MOST)


@pytest.mark.parametrize("formats", [F, WIDE], ids=["12", "16"])
@given(zf=NUMBERS, zi=NUMBERS, zg=NUMBERS, h=NUMBERS, lb=ints(0, 65535), u_shift=st.integers(1, 24))
def test_a_step_of_the_recurrence(formats, zf, zi, zg, h, lb, u_shift):
    lift, one = formats.state_fraction - 12, 1 << 16

    def sigma(z: int) -> int:
        return int(table.sigmoid(np.array(z), formats))

    def silu(z: int) -> int:
        return half_up(Fraction(z * sigma(z), one))

    gate = lb + half_up(Fraction((one - lb) * sigma(zf), one))
    state = half_up(Fraction(gate * h + (one - gate) * (silu(zi) << lift), one))
    state = clamp(state, formats.state_bits)
    kept = clamp(half_up(Fraction(state, 1 << lift)), 24)
    u = clamp(half_up(Fraction(zg * silu(kept), 1 << u_shift)), 24)
    arrays = [np.array([n]) for n in (zf, zi, zg, h, lb)]
    step = gates.mlgru(*arrays, u_shift, formats)
    assert (step.state.tolist(), step.u.tolist()) == ([state], [u])


@given(zf=NUMBERS, zi=NUMBERS, h=NUMBERS, lb=ints(0, 65535))
def test_a_state_stays_between_the_old_one_and_what_enters(zf, zi, h, lb):
    gate = gates.forget_gate(np.array(zf), np.array(lb), F)
    assert lb <= int(gate) <= 1 << 16
    entering = int(table.silu(np.array(zi), F))
    state = int(gates.next_state(gate, np.array(zi), np.array(h), F))
    assert min(h, entering) <= state <= max(h, entering)


def test_without_a_lower_bound_the_gate_is_the_sigmoid():
    z = np.arange(-9000, 9000, 11)
    assert np.array_equal(gates.forget_gate(z, None, F), table.sigmoid(z, F))
    assert np.array_equal(gates.forget_gate(z, np.zeros_like(z), F), table.sigmoid(z, F))


@given(gate=NUMBERS, up=NUMBERS, u_shift=st.integers(1, 24))
def test_a_gated_product_and_a_residual(gate, up, u_shift):
    silu = int(table.silu(np.array(gate), F))
    u = gates.glu(np.array([gate]), np.array([up]), u_shift, F)
    assert u.tolist() == [clamp(half_up(Fraction(silu * up, 1 << u_shift)), 24)]
    assert gates.residual(np.array([gate]), np.array([up]), F).tolist() == [clamp(gate + up, 24)]


@pytest.mark.parametrize(
    ("widths", "match"),
    [
        ({"vector_bits": 15}, r"vector_bits is 15, it must be a whole number 16\.\.32"),
        ({"table_bits": True}, "table_bits is True"),
        ({"vector_bits": 16}, "vector_fraction is 12; of vector_bits 16 it must leave 4 bits"),
        ({"state_fraction": 11}, "state_fraction is 11, it must be at least vector_fraction 12"),
        ({"state_bits": 12}, "state_fraction is 12, of state_bits 12 it may be 10 at most"),
        ({"vector_fraction": 6, "table_bits": 12}, "table_bits is 12, .* it may be 9 at most"),
    ],
)
def test_widths_that_cannot_be(widths, match):
    with pytest.raises(ValueError, match=match):
        Formats(**widths)
