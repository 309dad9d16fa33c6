"""The dense kernels and linears on every instruction set here, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from nomatmul import _native
from nomatmul.formats.quantise import quantise_activation, quantise_rows, to_bfloat16
from nomatmul.reference import ops
from nomatmul.reference.activations import ACTIVATIONS

KERNELS = _native.kernels
ISAS = KERNELS.isas()
UNIT = 2.0**-24


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 7, 64, 67, 768])
def test_norms(isa, size, rng):
    x = rng.standard_normal(size).astype(np.float32) * 3
    weight, bias = rng.standard_normal((2, size)).astype(np.float32)
    for shift, expected in (
        (bias, ops.layer_norm(x, weight, bias, 1e-5)),
        (None, ops.rms_norm(x, weight, 1e-5)),
    ):
        out = np.full_like(x, np.nan)
        assert KERNELS.norm(isa, x, weight, shift, 1e-5, out)
        # values near 1, a sum of `size` terms; the cancelling of x - mean at size 1 is exact
        np.testing.assert_allclose(out, expected, atol=64 * UNIT * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norm_finds_what_is_not_finite(isa, bad):
    x, ones = np.zeros(9, np.float32), np.ones(9, np.float32)
    x[8] = bad
    for bias in (None, ones):
        assert not KERNELS.norm(isa, x, ones, bias, 1e-5, np.empty_like(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("place", [0, 8])
def test_norm_finds_an_output_that_is_not_finite(isa, place):
    x, weight = np.zeros(9, np.float32), np.ones(9, np.float32)
    x[place], weight[place] = 1, 3e38
    for bias in (None, np.ones(9, np.float32)):
        assert not KERNELS.norm(isa, x, weight, bias, 1e-5, np.empty_like(x))


@pytest.mark.parametrize("isa", ISAS)
def test_activations(isa):
    x = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-6, 6, 4001), [0.0, -0.0]])
    x = x.astype(np.float32)
    for kind in ("gelu", "silu"):
        y = x.copy()
        KERNELS.activate(isa, kind, y)
        assert np.abs(y - ACTIVATIONS[kind](x)).max() < 1e-6, kind
    y = x.copy()
    KERNELS.activate(isa, "relu", y)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    for kind in ("gelu", "silu", "relu"):
        y = np.full(11, np.nan, np.float32)
        KERNELS.activate(isa, kind, y)
        assert np.isnan(y).all(), kind


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "size"), [(4, 16), (2, 24), (3, 5), (1, 1), (2, 64)])
def test_attention(isa, heads, size, rng):
    hidden = heads * size
    for tokens in (1, 6, 129, 33):
        qkv = rng.standard_normal((tokens, 3 * hidden)).astype(np.float32) * 2
        seen = (rng.random(tokens) < 0.6).astype(np.uint8)
        seen[0] = 1
        for mask in (None, seen):
            out = np.full((tokens, hidden), np.nan, np.float32)
            KERNELS.attention(isa, qkv, mask, heads, out)
            q, k, v = (
                part.reshape(1, tokens, heads, size)
                for part in np.split(qkv.astype(np.float64), 3, axis=1)
            )
            allowed = np.ones(tokens, bool) if mask is None else mask != 0
            wanted = ops.attend(q, k, v, np.broadcast_to(allowed, (1, tokens, tokens)))[0]
            # scores up to about 40, whose rounding the softmax passes on
            assert np.abs(out - wanted).max() < 256 * UNIT * np.abs(v).max()


@pytest.mark.parametrize("isa", ISAS)
def test_attention_keeps_large_scores_apart(isa):
    """One key wins by far, whatever the size of its score."""
    qkv = np.zeros((9, 3 * 8), np.float32)
    qkv[:, :8] = 300
    qkv[4, 8:16] = 300
    qkv[:, 16:] = np.arange(9, dtype=np.float32)[:, None]
    out = np.empty((9, 8), np.float32)
    KERNELS.attention(isa, qkv, None, 1, out)
    np.testing.assert_array_equal(out, np.full((9, 8), 4, np.float32))


SHAPES = [(1, 1, 1), (1, 7, 5), (13, 64, 33), (200, 129, 70), (5, 768, 16)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_linear_is_exact(isa, shape, rng):
    tokens, inputs, outputs = shape
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    x[0] = 0
    q, scale = quantise_rows(rng.standard_normal((outputs, inputs)))
    q[0] = -127  # the largest sums there are
    xq, step = quantise_activation(x)
    acc = xq.astype(np.int64) @ q.astype(np.int64).T
    for threads in (1, 2, 5):
        found = _native.Linear(q, scale, threads, isa)(x)
        np.testing.assert_array_equal(found, acc.astype(np.float32) * (scale * step))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float_linear(isa, shape, rng):
    tokens, inputs, outputs = shape
    x = rng.standard_normal((tokens, inputs)).astype(np.float32)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    stored = to_bfloat16(weight)
    for form in (weight, stored):
        linear = _native.Linear(form, None, 2, isa)
        found = linear(x)
        wide = form if form is weight else (stored.astype(np.uint32) << 16).view(np.float32)
        wanted = x.astype(np.float64) @ wide.astype(np.float64).T
        assert np.abs(found - wanted).max() <= 8 * np.sqrt(inputs) * UNIT * np.abs(wanted).max() + (
            4 * inputs * UNIT
        )
        # neither the other rows nor the threads change a bit
        np.testing.assert_array_equal(linear(x[-1:]), found[-1:])
        np.testing.assert_array_equal(_native.Linear(form, None, 1, isa)(x), found)


def test_mistakes_are_named():
    x, w = np.zeros((2, 4), np.float32), np.ones(4, np.float32)
    isa = ISAS[-1]
    with pytest.raises(ValueError, match="arrays differ in length"):
        KERNELS.norm(isa, w, np.ones(3, np.float32), None, 1e-5, w.copy())
    with pytest.raises(ValueError, match="y must not be x"):
        KERNELS.norm(isa, w, w, None, 1e-5, w)
    with pytest.raises(ValueError, match="heads divide"):
        KERNELS.attention(isa, np.zeros((2, 12), np.float32), None, 3, x)
    with pytest.raises(ValueError, match='activation "tanh" is unknown'):
        KERNELS.activate(isa, "tanh", w)
    with pytest.raises(ValueError, match="threads is 0, expected 1 to 1024"):
        _native.Linear(x, None, 0, isa)
    with pytest.raises(ValueError, match=r"linear.scale among them"):
        _native.Linear(np.zeros((2, 4), np.int8), None, 1, isa)
    with pytest.raises(ValueError, match="x has 3 columns, the weight 4"):
        _native.Linear(x, None, 1, isa)(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        _native.Linear(np.zeros((2, 4), np.int8), np.ones(2, np.float32), 1, isa)(x + np.nan)


def test_outputs_are_not_converted():
    """Results for an array of another type or order would go into a copy, and be lost."""
    w, isa = np.ones(4, np.float32), ISAS[-1]
    for wrong in (np.ones(4), np.ones(4, np.float32)[::-1]):
        with pytest.raises(TypeError):
            KERNELS.activate(isa, "gelu", wrong)
        with pytest.raises(TypeError):
            KERNELS.norm(isa, w, w, None, 1e-5, wrong)


def test_sizes_beyond_an_int_are_refused():
    """2^32 + 4 columns must not count as 4."""
    wide = np.empty((0, 2**32 + 4), np.float32)
    with pytest.raises(ValueError, match="x has 4294967300 columns"):
        _native.Linear(np.ones((4, 4), np.float32))(wide)
