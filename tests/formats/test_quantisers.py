"""Quantisers: bounds, ties, special cases, and blocks equal to the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.quantise import (
    absmean_scale,
    dequantised,
    fits_float16,
    from_bfloat16,
    from_float16,
    quantise_activation,
    quantise_groups,
    quantise_rows,
    quantise_weight,
    round_half_away,
    ternarise,
    to_bfloat16,
    to_float16,
)

FLOATS = st.floats(-1e6, 1e6, width=32)
MATRICES = st.tuples(st.integers(1, 6), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=FLOATS)
)


def test_ties_of_activations_round_away_from_zero():
    below_half = np.nextafter(np.float32(0.5), np.float32(0))
    values = np.float32([0.5, -0.5, 1.5, 2.5, -2.5, below_half, -below_half, 126.5, 0.0])
    expected = [1, -1, 2, 3, -3, 0, 0, 127, 0]
    assert round_half_away(values).tolist() == expected


def test_ties_of_weights_round_to_even():
    # mean |W| is 1, so the scaled weights are the weights: 0.5 goes to 0, 1.5 would go to 2.
    weight = np.float32([[0.5, -0.5, 1.5, -1.5, 1.0, 1.0]])
    t, scale = quantise_weight(weight)
    assert scale == 1.0
    assert t.tolist() == [[0, 0, 1, -1, 1, 1]]


@given(MATRICES)
def test_weights_become_ternary_and_the_scale_is_the_mean(weight):
    t, scale = quantise_weight(weight)
    assert t.dtype == np.int8
    assert set(np.unique(t)) <= {-1, 0, 1}
    mean = max(float(np.abs(weight.astype(np.float64)).mean()), 1e-5)
    assert scale == pytest.approx(mean, rel=1e-6)


@given(MATRICES, st.integers(1, 5))
def test_the_scale_of_blocks_is_the_scale_of_the_whole(weight, step):
    blocks = (weight[i : i + step] for i in range(0, len(weight), step))
    assert absmean_scale(blocks) == absmean_scale(weight)


def test_a_zero_weight_keeps_the_floor_as_its_scale():
    t, scale = quantise_weight(np.zeros((3, 5), np.float32))
    assert scale == np.float32(1e-5)
    assert not t.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_and_activations_that_are_not_finite_are_refused(bad):
    values = np.float32([[1.0, bad]])
    with pytest.raises(ValueError, match="not finite"):
        quantise_weight(values)
    with pytest.raises(ValueError, match="not finite"):
        quantise_activation(values)


def test_a_weight_without_elements_has_no_scale():
    with pytest.raises(ValueError, match="without elements"):
        quantise_weight(np.zeros((0, 4), np.float32))


@given(MATRICES)
def test_activations_stay_within_half_a_step(y):
    q, step = quantise_activation(y)
    assert q.dtype == np.int8
    assert step.shape == (*y.shape[:-1], 1)
    peak = np.maximum(np.abs(y).max(axis=-1, keepdims=True), np.float32(1e-5))
    np.testing.assert_array_equal(step, peak / np.float32(127))
    # Half a step, plus a few roundings of float32 relative to the peak.
    error = np.abs(q.astype(np.float64) * step - y)
    assert np.all(error <= step * 0.5 + peak * 4 * np.finfo(np.float32).eps)


def test_the_largest_activation_becomes_127():
    q, _ = quantise_activation(np.float32([[-3.0, 1.5, 0.0]]))
    assert q.tolist() == [[-127, 64, 0]]


@given(MATRICES)
def test_rows_of_an_embedding_stay_within_half_a_step(table):
    q, scale = quantise_rows(table)
    assert np.all(scale > 0)
    error = np.abs(q * scale[:, None].astype(np.float64) - table)
    peak = np.abs(table).max(axis=-1, keepdims=True)
    assert np.all(error <= scale[:, None] * 0.5 + peak * 4 * np.finfo(np.float32).eps)


@given(arrays(np.float32, 33, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_is_the_nearest(values):
    back = from_bfloat16(to_bfloat16(values))
    assert np.all(np.abs(back - values) <= np.abs(values) * 2.0**-8 + 1e-38)
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(back)), back)


def test_bfloat16_ties_go_to_even():
    ties = np.array([0x3F808000, 0x3F818000], dtype=np.uint32).view(np.float32)
    assert to_bfloat16(ties).tolist() == [0x3F80, 0x3F82]


def test_lower_bounds_start_at_zero_grow_and_stay_below_one(rng):
    bounds = cumulative_lower_bounds(rng.standard_normal((5, 7)) * 3)
    assert not bounds[0].any()
    assert np.all(np.diff(bounds, axis=0) >= 0)
    assert np.all(bounds < 1)
    assert not cumulative_lower_bounds(np.ones((1, 4))).any()


def test_ternarise_with_a_given_scale_is_not_requantised():
    assert ternarise(np.float32([[2.0, 0.4]]), np.float32(4.0)).tolist() == [[0, 0]]


def test_ties_of_activations_go_where_they_are_told():
    y = np.float32([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5, 0.49999997, -0.49999997]])
    wanted = {
        "away": [127, 1, 2, -1, -2, 3, 0, 0],
        "even": [127, 0, 2, 0, -2, 2, 0, 0],
        # the sum 0.49999997 + 0.5 is 1 in float32
        "up": [127, 1, 2, 0, -1, 3, 1, 0],
    }
    for rounding, values in wanted.items():
        q, step = quantise_activation(y, rounding)
        assert (q.tolist(), step.tolist()) == ([values], [[1.0]]), rounding


@given(MATRICES)
def test_each_group_is_quantised_like_a_row(y):
    wide = np.concatenate([y, 3 * y, np.zeros_like(y)], axis=1)
    q, step = quantise_groups(wide, y.shape[1])
    assert (q.shape, step.shape) == (wide.shape, (len(y), 3))
    for group in range(3):
        columns = slice(group * y.shape[1], (group + 1) * y.shape[1])
        alone, alone_step = quantise_activation(wide[:, columns], "even")
        np.testing.assert_array_equal(q[:, columns], alone)
        np.testing.assert_array_equal(step[:, group], alone_step[:, 0])


def test_values_of_scales_of_any_shape(rng):
    q = rng.integers(-127, 128, (6, 8)).astype(np.int8)
    scale = rng.uniform(0.1, 1, (6, 4)).astype(np.float32)
    for given_scale, whole in [
        (scale, np.repeat(scale, 2, axis=1)),
        (scale[:, 0], np.repeat(scale[:, :1], 8, axis=1)),
        (scale[:2, 0], np.repeat(np.repeat(scale[:2, :1], 3, axis=0), 8, axis=1)),
    ]:
        floats = dequantised(q, given_scale)
        assert floats.dtype == np.float32
        np.testing.assert_array_equal(floats, q.astype(np.float32) * whole)
    floats = scale.copy()
    assert dequantised(floats, None) is floats


def test_float16_rounds_to_even_and_tells_what_it_holds():
    assert to_float16(np.float32([1 + 2**-11, 1 + 3 * 2**-11])).tolist() == [1, 1 + 2**-9]
    assert np.isinf(to_float16(np.float32([70000.0])))
    assert fits_float16(np.float32([1.5, -65504, 2**-24]))
    assert not fits_float16(np.float32([1.5, 2**-25]))
    assert not fits_float16(np.float32([70000]))


def test_every_float16_becomes_its_float32():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = from_float16(finite)
    np.testing.assert_array_equal(found.view(np.uint32), finite.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(from_float16(every), every.astype(np.float32))
    assert from_float16(finite.reshape(2, -1)).shape == (2, len(finite) // 2)
    assert from_float16(finite[:0]).shape == (0,)
