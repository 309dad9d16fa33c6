"""The training primitives: the oracle's bits, float64 gradients, any number of threads.

Legend: N tokens, A visits of a token, V rows, K columns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fff_backends import F32, native_fff, oracle, random_layer, random_tokens
from numpy.typing import NDArray
from parity_backends import native

from nomatmul.reference import trees as reference

SHAPES = ((5, 64, 1, 2), (40, 129, 3, 3), (70, 300, 2, 5), (1, 7, 4, 0))  # N, K, trees, depth


def problem(shape: tuple[int, int, int, int]) -> tuple[Any, F32, F32, F32]:
    """Return (layer, w_in, w_out, x)."""
    tokens, hidden, trees, depth = shape
    layer = random_layer("f32", hidden, trees, depth, "gelu")
    w_in, w_out = (np.ascontiguousarray(layer.rows[:, side]) for side in (0, 1))
    return layer, w_in, w_out, random_tokens(layer, tokens)


def walked(shape: tuple[int, int, int, int]) -> tuple[F32, NDArray[np.int32]]:
    """Return (logits, rows) [N, A] of the oracle."""
    layer, _, _, x_NK = problem(shape)
    logits, rows = oracle(layer).walk(x_NK)
    return logits.reshape(len(x_NK), -1), rows.reshape(len(x_NK), -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_walk(shape: tuple[int, int, int, int], threads: int) -> None:
    layer, w_in, _, x_NK = problem(shape)
    for bias in (layer.bias, None):
        expected = oracle(dataclasses.replace(layer, bias=bias)).walk(x_NK)
        for isa in native().isas():
            logits = np.full(expected[0].shape, np.nan, np.float32)
            rows = np.full(logits.shape, -1, np.int32)
            native_fff().walk(
                x_NK, w_in, bias, logits, rows, layer.trees, layer.depth, threads, isa
            )
            np.testing.assert_array_equal(rows, expected[1])
            np.testing.assert_array_equal(logits.view(np.int32), expected[0].view(np.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_combine_and_its_gradients(shape: tuple[int, int, int, int], threads: int) -> None:
    _, _, w_VK, x_NK = problem(shape)
    h_NA, rows_NA = walked(shape)
    count, size = w_VK.shape
    for isa in native().isas():
        y_NK, out_NA = np.full_like(x_NK, np.nan), np.full_like(h_NA, np.nan)
        native_fff().combine(h_NA, rows_NA, w_VK, y_NK, threads, isa)
        np.testing.assert_array_equal(y_NK, reference.combine(h_NA, rows_NA, w_VK))
        native_fff().gather_dot(x_NK, rows_NA, w_VK, out_NA, threads, isa)
        np.testing.assert_array_equal(out_NA, reference.gather_dot(x_NK, rows_NA, w_VK))
        sum_VK, sums_V = np.full((count, size), np.nan, np.float32), np.full(count, np.nan, "f4")
        native_fff().segment_sum(h_NA, rows_NA, x_NK, sum_VK, sums_V, threads, isa)
        np.testing.assert_array_equal(sum_VK, reference.segment_sum(h_NA, rows_NA, x_NK, count))
        ones = np.ones((len(x_NK), 1), np.float32)
        sums_V1 = reference.segment_sum(h_NA, rows_NA, ones, count)
        np.testing.assert_array_equal(sums_V, sums_V1[:, 0])


def test_gradients_against_float64() -> None:
    """y = combine(h, rows, w): the three gradients of sum(y * g), by dense float64 products."""
    shape = SHAPES[2]
    _, _, w_VK, x_NK = problem(shape)
    h_NA, rows_NA = walked(shape)
    g_NK = np.random.default_rng(3).standard_normal(x_NK.shape).astype(np.float32)
    dense_NV = np.zeros((len(x_NK), len(w_VK)))
    np.put_along_axis(dense_NV, rows_NA.astype(np.int64), h_NA.astype(np.float64), axis=1)
    grad_w, grad_h = np.empty_like(w_VK), np.empty_like(h_NA)
    native_fff().segment_sum(h_NA, rows_NA, g_NK, grad_w, None, 2)
    native_fff().gather_dot(g_NK, rows_NA, w_VK, grad_h, 2)
    np.testing.assert_allclose(grad_w, dense_NV.T @ g_NK, atol=1e-3)
    everywhere = g_NK.astype(np.float64) @ w_VK.T.astype(np.float64)
    np.testing.assert_allclose(grad_h, np.take_along_axis(everywhere, rows_NA, 1), atol=1e-3)


def test_rows_without_visits_are_zero() -> None:
    out = np.full((6, 70), np.nan, np.float32)
    h, rows = np.full((2, 1), 3.0, np.float32), np.array([[4], [4]], np.int32)
    native_fff().segment_sum(h, rows, np.ones((2, 70), np.float32), out, None, 2)
    np.testing.assert_array_equal(out[4], np.full(70, 6.0))
    np.testing.assert_array_equal(np.delete(out, 4, 0), 0)


def test_a_walk_that_is_not_finite() -> None:
    x = np.full((2, 8), np.nan, np.float32)
    w, bias = np.ones((3, 8), np.float32), np.zeros(3, np.float32)
    logits, rows = np.empty((2, 1, 2), np.float32), np.empty((2, 1, 2), np.int32)
    with pytest.raises(ValueError, match="of token 0 are not finite"):
        native_fff().walk(x, w, bias, logits, rows, 1, 1, 1)
    with pytest.raises(ValueError, match="3 rows, but 1 trees of depth 2 have 7"):
        native_fff().walk(x, w, bias, logits, rows, 1, 2, 1)


def test_no_rows_at_all() -> None:
    nothing, rows = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)
    native_fff().segment_sum(nothing, rows, nothing, nothing.copy(), None, 2)


def test_outputs_are_not_converted() -> None:
    """Results for an array of another type would go into a copy, and be lost."""
    h, rows = np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32)
    w, y = np.ones((3, 8), np.float32), np.zeros((2, 8))
    for wrong in (y, np.zeros((8, 2), np.float32).T):
        with pytest.raises(TypeError):
            native_fff().combine(h, rows, w, wrong, 1)
    with pytest.raises(TypeError):
        native_fff().gather_dot(w[:2], rows, w, h.astype(np.float64), 1)
    with pytest.raises(TypeError):
        native_fff().segment_sum(h, rows, w[:2], w.copy(), np.zeros(3), 1)
    for logits, path in ((np.float64, np.int32), (np.float32, np.int64)):
        found = np.zeros((3, 1, 2), logits), np.zeros((3, 1, 2), path)
        with pytest.raises(TypeError):
            native_fff().walk(w, w, None, *found, 1, 1, 1)


def test_default_type_of_torch_does_not_matter() -> None:
    import torch

    from nomatmul.ops import fff as ops

    _, w_in, w_out, x_NK = problem(SHAPES[0])
    found = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            x, first, last = (
                torch.from_numpy(a.copy()).requires_grad_() for a in (x_NK, w_in, w_out)
            )
            y, logits, _ = ops.fff(
                x, first, last, trees=1, depth=2, activation="gelu", implementation="native"
            )
            (y.square().sum() + logits.sum()).backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([y.detach(), x.grad, first.grad, last.grad])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        np.testing.assert_array_equal(one.numpy(), other.numpy())
