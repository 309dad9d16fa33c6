"""Causal attention over paged keys and values: the order of docs/numerics.md, bit for bit, on every
instruction set.

Legend: T tokens, P positions, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from parity_backends import ISAS, kernels_of

from nomatmul.reference.exact import attend

F32 = NDArray[np.float32]
# (T, P, H, K, E): one token and many, around 16 positions and pages of 64, heads of every group.
SHAPES = (
    (1, 1, 1, 1, 64),
    (1, 15, 4, 2, 96),
    (1, 16, 8, 1, 80),
    (2, 17, 5, 1, 64),
    (3, 63, 6, 2, 128),
    (1, 64, 4, 1, 256),
    (7, 65, 3, 1, 20),
    (1, 129, 7, 1, 128),
    (40, 150, 2, 1, 40),
    (33, 33, 4, 4, 6),
    (2, 300, 8, 2, 64),
)


def inputs(shape: tuple[int, ...], seed: int = 0, spread: float = 1.0) -> tuple[F32, F32, F32]:
    """q [T, H, E], k and v [P, K, E]."""
    tokens, positions, heads, kv_heads, size = shape
    rng = np.random.default_rng([*shape, seed])
    q = rng.standard_normal((tokens, heads, size), np.float32) * np.float32(spread)
    k, v = rng.standard_normal((2, positions, kv_heads, size), np.float32)
    return q, k, v


def attended(isa: str, q: F32, k: F32, v: F32, kv: str = "f16", rows: int = 16) -> F32:
    out = np.full_like(q, np.nan)
    assert kernels_of(isa).causal_attention(isa, q, k, v, kv, rows, out)
    return out


def kept(x: F32, kv: str) -> F32:
    """Keys or values as the cache holds them."""
    if kv == "f32":
        return x
    if kv == "f16":
        return x.astype(np.float16).astype(np.float32)
    top = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5))
    return np.rint(x * (np.float32(127) / top)) * (top / np.float32(127))


def expected(q: F32, k: F32, v: F32, kv: str) -> F32:
    """By the oracle; the last token sees all positions."""
    tokens, positions = len(q), len(k)
    seen = np.tri(tokens, positions, positions - tokens, dtype=bool)
    return attend(q[None], kept(k, kv)[None], kept(v, kv)[None], seen[None]).reshape(q.shape)


@pytest.mark.parametrize("kv", ["f16", "int8", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_sums_is_the_written_one(shape: tuple[int, ...], kv: str) -> None:
    q, k, v = inputs(shape)
    np.testing.assert_array_equal(attended("scalar", q, k, v, kv), expected(q, k, v, kv))


@pytest.mark.parametrize("kv", ["f16", "int8", "f32"])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_as_scalar(isa: str, kv: str) -> None:
    for shape in SHAPES:
        q, k, v = inputs(shape, 1, spread=4.0)
        wanted = attended("scalar", q, k, v, kv)
        got = attended(isa, q, k, v, kv)
        np.testing.assert_array_equal(got.view(np.int32), wanted.view(np.int32), err_msg=str(shape))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_depend_on_the_rows_beside_them(isa: str) -> None:
    q, k, v = inputs((21, 140, 6, 2, 48), 2)
    wanted = attended(isa, q, k, v, rows=1)
    for rows in (2, 3, 4, 5, 7, 12, 16):
        np.testing.assert_array_equal(attended(isa, q, k, v, rows=rows), wanted)
    for t in (0, 9, 20):
        seen = 140 - 20 + t
        np.testing.assert_array_equal(attended(isa, q[t : t + 1], k[:seen], v[:seen])[0], wanted[t])


@pytest.mark.parametrize("isa", ISAS)
def test_float16_is_rounded_to_nearest_even(isa: str) -> None:
    """With one position a value comes out as it was kept."""
    edges = [0.0, -0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 2.0**-14, 6.1e-5, -6.0e-5, 65504, 65519.9]
    odd = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2047.5, -2048.5, 1e-9, 0.1, -1 / 3]
    rng = np.random.default_rng(3)
    spread = rng.standard_normal(47) * 2.0 ** rng.integers(-26, 15, 47)
    v = np.array([*edges, *odd, *spread], np.float32).reshape(1, 1, -1)
    q = np.ones_like(v)
    np.testing.assert_array_equal(attended(isa, q, q, v), v.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kv", ["f16", "int8", "f32"])
@pytest.mark.parametrize("isa", ISAS)
def test_far_scores_weigh_nothing(isa: str, kv: str) -> None:
    """Differences around exp's limit of 88, and far below it."""
    drops = np.array([0, 1, 80, 87.9, 88, 88.1, 200, 5000], np.float32)
    k = np.zeros((8, 1, 16), np.float32)
    k[:, 0, 0] = -drops
    q = np.zeros((1, 1, 16), np.float32)
    q[0, 0, 0] = 4  # times 1 / sqrt(16)
    v = np.tile(np.arange(1, 9, dtype=np.float32)[:, None, None], (1, 1, 16))
    np.testing.assert_array_equal(attended(isa, q, k, v, kv), expected(q, k, v, kv))


@pytest.mark.parametrize(
    ("bad", "kv"),
    [
        *((bad, kv) for bad in (np.nan, np.inf, -np.inf) for kv in ("f16", "int8", "f32")),
        (65520, "f16"),
    ],
)
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_is_reported(isa: str, bad: float, kv: str) -> None:
    for which in (0, 1):
        q, *both = inputs((1, 20, 2, 1, 33))
        both[which][11, 0, 32] = bad
        out = np.empty_like(q)
        assert not kernels_of(isa).causal_attention(isa, q, *both, kv, 16, out)
