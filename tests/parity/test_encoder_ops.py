"""The encoder's native steps on every instruction set here, against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nomatmul import _native
from nomatmul.formats.quantise import quantise_activation, quantise_rows
from nomatmul.reference import ops
from nomatmul.reference.encoder import layer_norm

NATIVE = _native.encoder
ISAS = _native.kernels.isas()
UNIT = 2.0**-24


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 7, 64, 67, 768])
def test_add_and_norm(isa, size, rng):
    x, delta = rng.standard_normal((2, 37, size)).astype(np.float32) * 3
    weight, bias = rng.standard_normal((2, size)).astype(np.float32)
    for shift, expected in (
        (bias, layer_norm(x + delta, weight, bias, 1e-5)),
        (None, ops.rms_norm(x + delta, weight, 1e-5)),
    ):
        summed, out = x.copy(), np.full_like(x, np.nan)
        NATIVE.add_norm(summed, delta, weight, shift, 1e-5, out, 2, isa)
        np.testing.assert_array_equal(summed, x + delta)
        # values near 1, a sum of `size` terms; the cancelling of x - mean at size 1 is exact
        np.testing.assert_allclose(out, expected, atol=64 * UNIT * np.abs(expected).max())
    out = np.full_like(x, np.nan)
    NATIVE.add_norm(x.copy(), None, weight, bias, 1e-5, out, 1, isa)
    expected = layer_norm(x, weight, bias, 1e-5)
    np.testing.assert_allclose(out, expected, atol=64 * UNIT * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norm_finds_what_is_not_finite(isa, bad):
    x = np.zeros((40, 9), np.float32)
    x[33, 8] = bad
    ones = np.ones(9, np.float32)
    for bias in (None, ones):
        with pytest.raises(ValueError, match="not finite"):
            NATIVE.add_norm(x.copy(), None, ones, bias, 1e-5, np.empty_like(x), 2, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("place", [0, 8])
def test_norm_finds_an_output_that_is_not_finite(isa, place):
    x, weight = np.zeros((40, 9), np.float32), np.ones(9, np.float32)
    x[33, place], weight[place] = 1, 3e38
    for bias in (None, np.ones(9, np.float32)):
        with pytest.raises(ValueError, match="not finite"):
            NATIVE.add_norm(x.copy(), None, weight, bias, 1e-5, np.empty_like(x), 2, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_activations(isa):
    x = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-6, 6, 4001), [0.0, -0.0]])
    x = x.astype(np.float32).reshape(1, -1)
    for kind, exact in (("gelu", ops.gelu), ("silu", ops.silu)):
        y = x.copy()
        NATIVE.activate(y, kind, 2, isa)
        assert np.abs(y - exact(x)).max() < 1e-6, kind
    y = x.copy()
    NATIVE.activate(y, "relu", 1, isa)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    nan = np.full((1, 11), np.nan, np.float32)
    for kind in ("gelu", "silu", "relu"):
        y = nan.copy()
        NATIVE.activate(y, kind, 1, isa)
        assert np.isnan(y).all(), kind


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "size"), [(4, 16), (2, 24), (3, 5), (1, 1), (2, 64)])
def test_attention_of_ragged_sequences(isa, heads, size, rng):
    lengths = (1, 6, 129, 33)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    hidden = heads * size
    qkv = rng.standard_normal((offsets[-1], 3 * hidden)).astype(np.float32) * 2
    seen = (rng.random(offsets[-1]) < 0.6).astype(np.uint8)
    seen[offsets[:-1]] = 1
    for mask in (None, seen):
        out = np.full((offsets[-1], hidden), np.nan, np.float32)
        NATIVE.attention(qkv, offsets, mask, heads, out, 2, isa)
        for first, last in itertools.pairwise(offsets):
            q, k, v = (
                part.reshape(1, last - first, heads, size)
                for part in np.split(qkv[first:last].astype(np.float64), 3, axis=1)
            )
            allowed = np.ones(last - first, bool) if mask is None else mask[first:last] != 0
            allowed = np.broadcast_to(allowed, (1, last - first, last - first))
            wanted = ops.attend(q, k, v, allowed)[0]
            # scores up to about 40, whose rounding the softmax passes on
            assert np.abs(out[first:last] - wanted).max() < 256 * UNIT * np.abs(v).max()


@pytest.mark.parametrize("isa", ISAS)
def test_attention_keeps_large_scores_apart(isa):
    """One key wins by far, whatever the size of its score."""
    qkv = np.zeros((9, 3 * 8), np.float32)
    qkv[:, :8] = 300
    qkv[4, 8:16] = 300
    qkv[:, 16:] = np.arange(9, dtype=np.float32)[:, None]
    out = np.empty((9, 8), np.float32)
    NATIVE.attention(qkv, np.array([0, 9]), None, 1, out, 1, isa)
    np.testing.assert_array_equal(out, np.full((9, 8), 4, np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 7, 5), (13, 64, 33), (200, 129, 70), (5, 768, 16)]
)
def test_int8_product_is_exact(isa, shape, rng):
    tokens, inputs, outputs = shape
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    x[0] = 0
    q, scale = quantise_rows(rng.standard_normal((outputs, inputs)))
    q[0] = -127  # the largest sums there are
    out = np.full((tokens, outputs), np.nan, np.float32)
    NATIVE.linear_int8(x, NATIVE.panels(q, isa), scale, out, 2, isa)
    xq, step = quantise_activation(x)
    acc = xq.astype(np.int64) @ q.astype(np.int64).T
    np.testing.assert_array_equal(out, acc.astype(np.float32) * (scale * step))


def test_mistakes_are_named():
    x, w = np.zeros((2, 4), np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="weight has a value for each column"):
        NATIVE.add_norm(x, None, np.ones(3, np.float32), None, 1e-5, x.copy())
    with pytest.raises(ValueError, match="out must not be x"):
        NATIVE.add_norm(x, None, w, None, 1e-5, x)
    with pytest.raises(ValueError, match="no sequence is empty"):
        NATIVE.attention(np.zeros((2, 12), np.float32), np.array([0, 2, 2]), None, 2, x)
    with pytest.raises(ValueError, match="threads is 0, expected 1 to 1024"):
        NATIVE.activate(x, "gelu", 0)
    with pytest.raises(ValueError, match="panels do not fit"):
        NATIVE.linear_f32(x, np.zeros(3, np.float32), np.empty((2, 4), np.float32))
    with pytest.raises(ValueError, match="panels do not fit"):
        NATIVE.linear_int8(x, np.zeros(3, np.int8), w, np.empty((2, 4), np.float32))


def test_outputs_are_not_converted():
    """Results for an array of another type or order would go into a copy, and be lost."""
    x, w = np.ones((4, 4), np.float32), np.ones(4, np.float32)
    for wrong in (np.ones((4, 4)), np.ones((4, 4), np.float32)[:, ::-1]):
        with pytest.raises(TypeError):
            NATIVE.activate(wrong, "gelu")
        with pytest.raises(TypeError):
            NATIVE.add_norm(wrong, None, w, None, 1e-5, x.copy())
        with pytest.raises(TypeError):
            NATIVE.add_norm(x, None, w, None, 1e-5, wrong)
        with pytest.raises(TypeError):
            NATIVE.attention(np.ones((4, 12), np.float32), np.array([0, 4]), None, 2, wrong)
        with pytest.raises(TypeError):
            NATIVE.linear_f32(x, NATIVE.float_panels(x), wrong)
        with pytest.raises(TypeError):
            NATIVE.linear_int8(x, NATIVE.panels(x.astype(np.int8)), w, wrong)


def test_sizes_beyond_an_int_are_refused():
    """2^32 + 4 columns must not count as 4."""
    panels = NATIVE.float_panels(np.ones((4, 4), np.float32))
    wide = np.empty((0, 2**32 + 4), np.float32)
    with pytest.raises(ValueError, match="above 8000000"):
        NATIVE.linear_f32(wide, panels, np.empty((0, 4), np.float32))


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_attention_with_more_threads_than_heads(threads, rng):
    qkv = rng.standard_normal((7, 12)).astype(np.float32)
    found = []
    for count in (1, threads):
        out = np.full((7, 4), np.nan, np.float32)
        NATIVE.attention(qkv, np.array([0, 7]), None, 2, out, count)
        found.append(out)
    np.testing.assert_array_equal(*found)
