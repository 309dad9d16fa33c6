"""Quantised matrices: rows, scales, groups, and matrices above one another."""

from __future__ import annotations

import numpy as np
import pytest

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.quantised import Quantised, stacked


def quantised(rng, rows, columns, scale, group=0, kind="ternary"):
    values = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
    scale = np.asarray(scale, np.float32)
    return values, Quantised(kind, (rows, columns), group, scale, lambda part: values[part])


def test_scales_of_blocks_of_rows(rng):
    values, matrix = quantised(rng, 6, 64, [0.5, 2.0])
    whole = np.repeat([0.5, 2.0], 3)[:, None] * values
    np.testing.assert_array_equal(matrix.floats(), whole)
    np.testing.assert_array_equal(matrix.floats(slice(2, 5)), whole[2:5])


def test_groups_are_cut_and_never_joined(rng):
    scale = rng.random((4, 2)) + 0.5
    _, matrix = quantised(rng, 4, 256, scale, group=128)
    fine = matrix.grouped(64)
    assert fine.scale.shape == (4, 4)
    np.testing.assert_array_equal(fine.floats(), matrix.floats())
    np.testing.assert_array_equal(fine.floats(slice(1, 3)), matrix.floats(slice(1, 3)))
    _, rows = quantised(rng, 4, 256, [0.25, 3.0])
    assert rows.grouped(256).scale.tolist() == [[0.25], [0.25], [3.0], [3.0]]
    with pytest.raises(ValueError, match="groups of 128 inputs cannot be cut into groups of 256"):
        matrix.grouped(256)


def test_stacked_matrices_keep_their_scales(rng):
    parts = [quantised(rng, rows, 32, scale) for rows, scale in ((4, [0.5, 1.0]), (6, [2.0]))]
    whole = stacked([matrix for _, matrix in parts])
    expected = np.concatenate([matrix.floats() for _, matrix in parts])
    assert whole.shape == (10, 32)
    assert whole.scale.tolist() == [0.5, 1.0, 2.0, 2.0, 2.0]
    np.testing.assert_array_equal(whole.floats(), expected)
    for start, stop in ((0, 3), (3, 8), (4, 10), (5, 5)):
        np.testing.assert_array_equal(whole.floats(slice(start, stop)), expected[start:stop])


@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf])
def test_scales_that_are_none(rng, value):
    _, matrix = quantised(rng, 4, 64, [[0.5, value]] * 4, group=32)
    with pytest.raises(FormatError, match=r"q_proj: a scale is (0.0|-0.5|nan|inf); scales are"):
        matrix.checked("q_proj")


def test_scales_of_another_shape(rng):
    for scale, group in (([0.5] * 4, 0), ([[0.5]] * 5, 32), ([[0.5]], 0)):
        _, matrix = quantised(rng, 5, 64, scale, group)
        with pytest.raises(FormatError, match="do not fit 5 rows of 64 inputs"):
            matrix.checked("q_proj")


@pytest.mark.parametrize(
    ("scale", "group", "rows"),
    [
        ([0.5], 0, (2, 5)),
        ([0.5, 2.0], 0, (3, 6)),
        ([0.5, 2.0], 0, (4, 6)),
        (np.arange(1, 13).reshape(6, 2), 32, (1, 4)),
    ],
)
def test_a_part_is_a_matrix_of_its_own(rng, scale, group, rows):
    values, matrix = quantised(rng, 6, 64, scale, group)
    part = matrix.part(slice(*rows)).checked("part")
    np.testing.assert_array_equal(part.floats(), matrix.floats()[slice(*rows)])
    np.testing.assert_array_equal(part.read(slice(1, None)), values[rows[0] + 1 : rows[1]])
    inner = part.part(slice(1, 2))
    np.testing.assert_array_equal(inner.floats(), matrix.floats()[rows[0] + 1 : rows[0] + 2])
