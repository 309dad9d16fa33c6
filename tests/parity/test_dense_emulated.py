"""The dense AVX512 kernels in software (SIMDe), for machines that lack the instructions."""

from __future__ import annotations

import ctypes

import numpy as np
import parity_emulated
import pytest

from nomatmul.formats.quantise import quantise_activation, quantise_rows
from nomatmul.reference import ops
from nomatmul.reference.activations import ACTIVATIONS

UNIT = 2.0**-24


@pytest.fixture(scope="module")
def library():
    loaded = ctypes.CDLL(str(parity_emulated.library()))
    loaded.dense_attention_scratch.restype = ctypes.c_size_t
    loaded.dense_norm.restype = ctypes.c_bool
    return loaded


def at(array):
    assert array is None or array.flags.c_contiguous
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@pytest.mark.parametrize("size", [5, 16, 67])
def test_norms(library, rng, size):
    x, weight, bias = rng.standard_normal((3, size)).astype(np.float32)
    wanted = ops.layer_norm(x, weight, bias, 1e-5)
    y, eps = np.empty_like(x), ctypes.c_float(1e-5)
    assert library.dense_norm(at(x), at(weight), at(bias), eps, size, at(y))
    np.testing.assert_allclose(y, wanted, atol=64 * UNIT * np.abs(wanted).max())
    x[0] = np.nan
    assert not library.dense_norm(at(x), at(weight), at(bias), eps, size, at(y))


def test_activations(library):
    x = np.linspace(-20, 20, 999, dtype=np.float32)
    for kind, name in enumerate(("gelu", "silu")):
        y = x.copy()
        library.dense_activate(kind, at(y), ctypes.c_size_t(len(y)))
        assert np.abs(y - ACTIVATIONS[name](x)).max() < 1e-6


@pytest.mark.parametrize(("tokens", "size"), [(1, 3), (37, 16), (70, 40)])
def test_attention(library, rng, tokens, size):
    qkv = rng.standard_normal((tokens, 3 * size)).astype(np.float32)
    seen = (rng.random(tokens) < 0.6).astype(np.uint8)
    seen[0] = 1
    q, k, v = (part.reshape(1, tokens, 1, size) for part in np.split(qkv, 3, axis=1))
    wanted = ops.attend(q, k, v, np.broadcast_to(seen != 0, (1, tokens, tokens)))[0]
    scratch = np.empty(library.dense_attention_scratch(tokens, size), np.float32)
    out = np.full((tokens, size), np.nan, np.float32)
    d = ctypes.c_size_t(size)
    library.dense_attention(at(qkv), d, at(seen), tokens, size, at(scratch), at(out))
    assert np.abs(out - wanted).max() < 64 * UNIT * np.abs(v).max()


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 37), (17, 300, 64)])
def test_products(library, rng, shape):
    rows, inputs, outputs = shape
    columns = library.dense_columns()
    count = -(-outputs // columns)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    w = rng.standard_normal((count * columns, inputs)).astype(np.float32)
    w[outputs:] = 0
    panels = np.ascontiguousarray(w.reshape(count, columns, inputs).swapaxes(1, 2))
    out = np.full((rows, outputs), np.nan, np.float32)
    sizes = (rows, inputs)
    library.dense_float_product(at(x), *sizes, at(panels), count, outputs, at(out))
    wanted = x.astype(np.float64) @ w[:outputs].astype(np.float64).T
    assert np.abs(out - wanted).max() < 4 * max(inputs, 8) * UNIT

    q, scale = quantise_rows(w[:outputs])
    xq, step = quantise_activation(x)
    even = inputs + inputs % 2
    wide_w = np.zeros((count * columns, even), np.int8)
    wide_w[:outputs, :inputs] = q
    panels = wide_w.reshape(count, columns, even // 2, 2).swapaxes(1, 2)
    wide_x = np.zeros((rows, even), np.int16)
    wide_x[:, :inputs] = xq
    panels, steps = np.ascontiguousarray(panels), np.ascontiguousarray(step[:, 0])
    library.dense_product(
        *(at(wide_x), ctypes.c_size_t(even), *sizes, at(panels), count, outputs),
        *(at(scale), at(steps), at(out)),
    )
    acc = xq.astype(np.int64) @ q.astype(np.int64).T
    np.testing.assert_array_equal(out, acc.astype(np.float32) * (scale * step))
