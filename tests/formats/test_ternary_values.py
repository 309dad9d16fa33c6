"""Ternary values in float matrices: their scales are found, and every element is compared."""

from __future__ import annotations

import numpy as np
import pytest

from nomatmul.formats.published import ternary_values
from nomatmul.formats.published.ternary_values import scan, stray_share, ternary_matrix


def ternary(rng, rows, columns):
    values = rng.integers(-1, 2, (rows, columns)).astype(np.float32)
    values[:, ::7] = 1  # no group is all zeros
    return values


def scales(rng, *shape):
    return (rng.random(shape) + 0.5).astype(np.float16).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(ternary_values, "_BLOCK_ELEMENTS", 2048)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1), (256, "a tensor")),
        ((4, 1), (256, "a block of 6 rows")),
        ((24, 1), (256, "a row")),
        ((1, 4), (128, "a shard of 128 columns")),
        ((1, 16), (32, "32 inputs of a row")),
        ((24, 2), (256, "256 inputs of a row")),
        ((24, 4), (128, "128 inputs of a row")),
        ((24, 8), (64, "64 inputs of a row")),
        ((24, 16), (32, "32 inputs of a row")),
        ((2, 4), (128, "128 inputs of a row")),
    ],
)
def test_scales_are_found(rng, shape, expected):
    scale = scales(rng, *shape)
    weight = ternary(rng, 24, 512)
    weight *= np.kron(scale, np.ones((24 // shape[0], 512 // shape[1]), np.float32))
    found = scan(lambda rows: weight[rows], weight.shape)
    assert (found.group, found.scales, found.empty) == (*expected, False)
    matrix = ternary_matrix(lambda rows: weight[rows], weight.shape, found.group)
    assert matrix.scale.shape == (24, 512 // found.group)
    np.testing.assert_array_equal(matrix.floats(), weight)
    np.testing.assert_array_equal(matrix.read(slice(3, 5)), np.sign(weight[3:5]))


@pytest.mark.parametrize("at", [(0, 0), (11, 63), (23, 511)])
def test_one_stray_value_is_seen_wherever_it_is(rng, at):
    weight = ternary(rng, 24, 512) * np.float32(0.37)
    for stray in (0.36, 0.37 * (1 + 2**-20), 1e-30, 5.0):
        changed = weight.copy()
        changed[at] = stray
        assert scan(lambda rows, w=changed: w[rows], weight.shape) is None
        share = stray_share(lambda rows, w=changed: w[rows], weight.shape)
        assert share == pytest.approx(1 / weight.size)


def test_dense_weights_are_strays(rng):
    weight = rng.standard_normal((24, 512)).astype(np.float32)
    assert scan(lambda rows: weight[rows], weight.shape) is None
    assert stray_share(lambda rows: weight[rows], weight.shape) > 0.9


def test_groups_of_zeros_take_any_scale(rng):
    weight = ternary(rng, 8, 256) * scales(rng, 8, 1)
    weight[2, 64:128] = 0
    weight[5] = 0
    found = scan(lambda rows: weight[rows], weight.shape)
    assert (found.group, found.scales) == (256, "a row")
    matrix = ternary_matrix(lambda rows: weight[rows], weight.shape, 64)
    np.testing.assert_array_equal(matrix.checked("w").floats(), weight)
    assert matrix.scale[2].tolist() == [matrix.scale[2, 0]] * 4
    nothing = np.zeros((8, 256), np.float32)
    assert scan(lambda rows: nothing[rows], nothing.shape).empty
    empty = ternary_matrix(lambda rows: nothing[rows], nothing.shape, 256)
    assert empty.scale.tolist() == [[1.0]] * 8


def test_rows_that_no_group_divides(rng):
    weight = ternary(rng, 6, 48) * np.float32(0.25)
    found = scan(lambda rows: weight[rows], weight.shape)
    assert (found.group, found.scales) == (0, "a tensor")
