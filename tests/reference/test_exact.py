"""Fused multiply-adds and the sums made of them, against exact arithmetic and plain loops."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.formats.quantise import quantise_activation
from nomatmul.reference.activations import exp_poly
from nomatmul.reference.exact import attend, float_product, fma, halved
from nomatmul.reference.linear import GroupLinear, IntegerLinear
from nomatmul.reference.ops import attend as blas_attend

F = np.float32
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded(value: Fraction) -> np.float32:
    """The float32 nearest to an exact value, ties to even."""
    if value == 0:
        return F(0)
    exponent = -150
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    exponent = max(exponent, -149)
    whole = round(value / Fraction(2) ** exponent)  # of a Fraction: ties to even
    with np.errstate(over="ignore"):
        return F(np.ldexp(np.float64(whole), exponent))


@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_the_exact_result_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if abs(exact) > Fraction(float(np.finfo(F).max)):
        return
    assert fma(F([a]), F([b]), F([c]))[0] == rounded(exact)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [2.0**-90, 1.0, 2.0**90])
def test_fma_where_float64_rounds_onto_a_tie(sign, scale):
    # (1 + 2^-23) + 2^-24 - 2^-70 lies below the middle of two float32; float64 ends on it
    a, b = F([sign * (2.0**-12 + 2.0**-35)]), F([(2.0**-12 - 2.0**-35) * scale])
    c = F([sign * (1 + 2.0**-23) * scale])
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    twice = (a.astype(np.float64) * b + c).astype(F)
    assert fma(a, b, c)[0] == rounded(exact) == c[0]
    assert twice[0] != c[0]


def chain(x, w):
    total = F(0)
    for a, b in zip(x, w, strict=True):
        total = fma(F([a]), F([b]), F([total]))[0]
    return total


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40])
def test_products_of_floats_have_sixteen_lanes(rng, columns):
    x, w = rng.standard_normal((3, columns)).astype(F), rng.standard_normal((5, columns)).astype(F)
    found = float_product(x, w)
    for t in range(3):
        for n in range(5):
            lanes = [chain(x[t, i::16], w[n, i::16]) for i in range(16)]
            for width in (8, 4, 2, 1):
                lanes = [F(lanes[i] + lanes[i + width]) for i in range(width)]
            assert found[t, n] == lanes[0]
    np.testing.assert_allclose(found, x @ w.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(float_product(x[None], w)[0], found)


def test_attention_is_computed_position_by_position(rng):
    batch, steps, heads, kv_heads, size, total = 2, 3, 4, 2, 6, 21
    q = rng.standard_normal((batch, steps, heads, size)).astype(F) * 3
    k, v = (rng.standard_normal((batch, total, kv_heads, size)).astype(F) for _ in range(2))
    allowed = np.tri(steps, total, total - steps, dtype=bool)[None].repeat(batch, 0)
    allowed[1, :, :2] = False
    found = attend(q, k, v, allowed).reshape(batch, steps, heads, size)
    scale = F(1 / np.sqrt(np.float64(size)))
    for b, t, h in np.ndindex(batch, steps, heads):
        keys, values = k[b, :, h // 2], v[b, :, h // 2]
        scores = np.array([chain(q[b, t, h], keys[s]) * scale for s in range(total)], F)
        seen = np.flatnonzero(allowed[b, t])
        w = np.zeros(total, F)
        w[seen] = exp_poly(scores[seen] - scores[seen].max())
        lanes = np.zeros(16, F)
        for s in range(total):
            lanes[s % 16] += w[s]
        for e in range(size):
            assert found[b, t, h, e] == chain(w, values[:, e]) / halved(lanes)
    close = blas_attend(q, k, v, allowed).reshape(found.shape)
    np.testing.assert_allclose(found, close, atol=2e-6)


def test_scores_far_below_the_best_count_as_nothing():
    q, k = F([[[[100.0]]]]), F([[[[1.0]], [[0.1]]]])
    v = F([[[[2.0]], [[np.float32(1e30)]]]])
    out = attend(q, k, v, np.ones((1, 1, 2), bool))
    assert out.tolist() == [[[2.0]]]
    assert attend(q, k, v, np.zeros((1, 1, 2), bool)).tolist() == [[[0.0]]]


def test_groups_are_quantised_and_added_in_their_order(rng):
    w = rng.integers(-1, 2, (5, 96)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (5, 3)).astype(F)
    x = rng.standard_normal((2, 96)).astype(F) * np.repeat(F([1, 30, 0.1]), 32)
    found = GroupLinear(w, scale)(x)
    for t in range(2):
        for n in range(5):
            total = F(0)
            for g in range(3):
                part = slice(32 * g, 32 * (g + 1))
                q, step = quantise_activation(x[t, part], "even")
                acc = F(int(q.astype(int) @ w[n, part].astype(int)))
                total = fma(F([acc]), F([scale[n, g] * step[0]]), F([total]))[0]
            assert found[t, n] == total
    exact = x @ (w * np.repeat(scale, 32, axis=1)).T
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())


def test_blocks_of_rows_have_their_scale(rng):
    w = rng.integers(-1, 2, (6, 8)).astype(np.int8)
    x = rng.standard_normal((4, 8)).astype(F)
    halves = IntegerLinear(w, F([0.5, 3]))(x)
    np.testing.assert_array_equal(halves[:, :3], IntegerLinear(w[:3], F(0.5))(x))
    np.testing.assert_array_equal(halves[:, 3:], IntegerLinear(w[3:], F([3]))(x))
    one_a_row = IntegerLinear(w, F([1, 2, 3, 4, 5, 6]))(x)
    np.testing.assert_array_equal(one_a_row[:, 4:5], IntegerLinear(w[4:5], F(5))(x))


def test_roundings_of_a_linear_are_those_of_its_quantiser():
    w = np.ones((1, 3), np.int8)
    x = F([[127, 0.5, 1.5]])
    found = {r: IntegerLinear(w, F(1), None, r)(x).item() for r in ("away", "even", "up")}
    assert found == {"away": 130.0, "even": 129.0, "up": 130.0}
