"""The oracle's operations against their definitions, written here in float64 or with loops."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from nomatmul.formats.quantise import quantise_weight
from nomatmul.formats.rotary import frequencies, tables
from nomatmul.reference import activations, ops
from nomatmul.reference.linear import IntegerLinear

EPS32 = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 500])
def test_rms_norm_is_its_definition(rng, size):
    x = rng.standard_normal((3, size)).astype(np.float32) * 5
    weight = rng.standard_normal(size).astype(np.float32)
    root = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-6)
    # Five roundings: square, mean, sum with eps, root, division and product.
    np.testing.assert_allclose(
        ops.rms_norm(x, weight, 1e-6), x / root * weight, rtol=4 * EPS32, atol=0
    )


def test_rms_norm_does_not_depend_on_the_order_of_summation(rng):
    x = rng.standard_normal((200, 333)).astype(np.float32)
    order = rng.permutation(333)
    ones = np.ones(333, np.float32)
    shuffled = ops.rms_norm(x[:, order], ones, 1e-6)
    np.testing.assert_array_equal(shuffled, ops.rms_norm(x, ones, 1e-6)[:, order])


def test_sigmoid_and_silu_have_no_overflow():
    x = np.float32([-1e30, -200, -90, -1, 0, 1, 90, 200, 1e30])
    with np.errstate(all="raise", under="ignore"):
        s = activations.sigmoid(x)
    expected = [0.0 if v < -700 else 1 / (1 + math.exp(-min(v, 700.0))) for v in x.astype(float)]
    np.testing.assert_allclose(s, expected, rtol=4 * EPS32, atol=1e-38)
    np.testing.assert_array_equal(activations.silu(x), x * s)


def test_gelu_is_the_exact_one():
    x = np.float32([-3, -1, 0, 0.5, 2])
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)]
    np.testing.assert_allclose(activations.gelu(x), expected, rtol=4 * EPS32)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (7, 128), (2, 1000)])
def test_accumulators_are_exact(rng, rows, columns):
    q = rng.integers(-128, 128, (4, columns), dtype=np.int8)
    t = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
    acc = ops.exact_product(q, t)
    assert acc.dtype == np.int32
    expected = [[sum(int(a) * int(b) for a, b in zip(x, w, strict=True)) for w in t] for x in q]
    assert acc.tolist() == expected


def test_accumulators_are_exact_at_the_largest_sum():
    q = np.full((1, 131_072), -128, np.int8)
    assert ops.exact_product(q, np.ones((1, 131_072), np.int8)) == -(2**24)


@pytest.mark.parametrize(("largest", "columns"), [(1, 180_001), (127, 100_001), (-128, 100_001)])
def test_accumulators_are_exact_beyond_what_one_float32_sum_holds(rng, largest, columns):
    """Odd sums far above 2^24, which float32 cannot hold."""
    t = np.full((3, columns), largest, np.int8)
    t[1] = rng.integers(-abs(largest), abs(largest), columns, dtype=np.int8)
    q = rng.integers(-128, -100, (2, columns), dtype=np.int8)
    expected = q.astype(np.int64) @ t.astype(np.int64).T
    assert np.abs(expected).max() > (1 << 24)
    np.testing.assert_array_equal(ops.exact_product(q, t), expected)


def test_bit_linear_is_close_to_the_float_product_of_what_it_stands_for(rng):
    weight = rng.standard_normal((9, 64)).astype(np.float32)
    t, scale = quantise_weight(weight)
    norm = (1 + 0.2 * rng.standard_normal(64)).astype(np.float32)
    layer = IntegerLinear(t, scale, functools.partial(ops.rms_norm, weight=norm, eps=1e-6))
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    q, step = layer.quantised_input(x)
    exact = (q.astype(np.float64) * step) @ (t.astype(np.float64) * scale).T
    np.testing.assert_allclose(layer(x), exact, rtol=4 * EPS32, atol=1e-7)
    np.testing.assert_array_equal(
        layer(x), layer.accumulators(q).astype(np.float32) * (scale * step)
    )


def test_a_zero_token_gives_zero(rng):
    norm = functools.partial(ops.rms_norm, weight=np.ones(8, np.float32), eps=1e-6)
    layer = IntegerLinear(np.ones((3, 8), np.int8), np.float32(1), norm)
    assert not layer(np.zeros((1, 8), np.float32)).any()


def test_gates_lift_to_the_bound():
    f = np.float32([-100.0, 0.0, 100.0])
    zero = np.zeros(3, np.float32)
    bound = np.full(3, 0.25, np.float32)
    np.testing.assert_allclose(ops.mlgru_gates(zero, f, bound)[1], [0.25, 0.625, 1.0])
    np.testing.assert_allclose(ops.mlgru_gates(zero, f, None)[1], [0.0, 0.5, 1.0], atol=1e-30)
    i, _ = ops.mlgru_gates(np.float32([2.0] * 3), f, bound)
    silu = 2 / (1 + math.exp(-2))
    np.testing.assert_allclose(i, [silu * 0.75, silu * 0.375, 0.0], rtol=4 * EPS32)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63])
@pytest.mark.parametrize("chunk", [1, 4, 16, 100])
def test_chunked_recurrence_is_the_recurrence(rng, tokens, chunk):
    i = rng.standard_normal((2, tokens, 5)).astype(np.float32)
    f = rng.random((2, tokens, 5)).astype(np.float32)
    f[0, tokens // 2] = 0.0  # a gate that forgets everything must not hurt
    h0 = rng.standard_normal((2, 5)).astype(np.float32)
    h, last = ops.mlgru_recurrent(i, f, h0)
    chunked, chunked_last = ops.mlgru_chunked(i, f, h0, chunk)
    # Each of at most `tokens` steps adds a few roundings of values below the sum of magnitudes.
    bound = 8 * tokens * EPS32 * (np.abs(i).sum(axis=1).max() + np.abs(h0).max())
    np.testing.assert_allclose(chunked, h, rtol=0, atol=bound)
    np.testing.assert_allclose(chunked_last, last, rtol=0, atol=bound)


def test_recurrence_by_hand():
    i = np.float32([[[1.0], [2.0], [3.0]]])
    f = np.float32([[[0.5], [0.5], [0.0]]])
    h, last = ops.mlgru_recurrent(i, f, np.float32([[4.0]]))
    assert h[0, :, 0].tolist() == [3.0, 3.5, 3.0]
    assert last.tolist() == [[3.0]]


def test_rotation_keeps_lengths_and_depends_on_distance_only(rng):
    q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def turned(x, position):
        half = x.shape[-1] // 2
        return ops.rotate(x, *tables(np.array([[position]]), *frequencies(2 * half, 1e4)))

    np.testing.assert_array_equal(turned(q, 0), q)
    for gap in range(3):
        products = [np.sum(turned(q, p + gap) * turned(k, p)) for p in range(3)]
        np.testing.assert_allclose(products, products[0], rtol=1e-5)
    one = turned(np.float32([[[[1, 0, 0, 0]]]]), 1)
    np.testing.assert_allclose(one[0, 0, 0], [math.cos(1), 0, math.sin(1), 0], rtol=1e-6)


def test_heads_of_queries_share_keys_and_values(rng):
    q = rng.standard_normal((2, 3, 6, 4)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 5, 2, 4)).astype(np.float32)
    allowed = np.ones((2, 3, 5), bool)
    out = ops.attend(q, k, v, allowed)
    whole = ops.attend(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), allowed)
    np.testing.assert_array_equal(out, whole)
    first = ops.attend(q[:, :, :3], k[:, :, :1], v[:, :, :1], allowed)
    np.testing.assert_allclose(out[..., :12], first, rtol=1e-6)


def test_relu2_squares_what_is_above_zero():
    x = np.float32([-3, -0.0, 0.5, 3])
    assert activations.relu2(x).tolist() == [0, 0, 0.25, 9]


def test_attention_by_hand(rng):
    q, k, v = rng.standard_normal((3, 1, 3, 2, 4)).astype(np.float32)
    allowed = np.tri(3, dtype=bool)[None]
    out = ops.attend(q, k, v, allowed)
    assert out.shape == (1, 3, 8)
    for head in range(2):
        for t in range(3):
            scores = np.exp([q[0, t, head] @ k[0, s, head] / 2 for s in range(t + 1)])
            expected = (scores / scores.sum()) @ v[0, : t + 1, head]
            np.testing.assert_allclose(
                out[0, t, head * 4 : head * 4 + 4], expected, rtol=1e-5, atol=1e-6
            )


def test_attention_where_nothing_is_allowed_is_zero(rng):
    q, k, v = rng.standard_normal((3, 1, 1, 1, 4)).astype(np.float32)
    assert not ops.attend(q, k, v, np.zeros((1, 1, 1), bool)).any()
