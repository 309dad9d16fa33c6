"""Products of rows with scales of groups, and of float rows: the definition in plain numpy, bit for
bit on every instruction set.

Legend: M tokens, K inputs, N rows, G groups of a row's inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from parity_backends import ISAS, kernels_of, pack

Array = NDArray[Any]
F32 = NDArray[np.float32]

TOKENS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 33, 70)
ROWS = (1, 15, 16, 17, 33, 50)
FORMS = ("2bit", "1.6bit", "int8")


def fma(a: Array, b: Array, c: Array) -> F32:
    """float32(a * b + c), rounded once. A product of float32 is exact in float64; the sum is
    rounded to odd there, so that rounding it again to float32 is right."""
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    away = np.where(error > 0, np.inf, -np.inf)
    odd = (total.view(np.int64) & 1) == 1
    return np.where((error == 0) | odd, total, np.nextafter(total, away)).astype(np.float32)


def expected(values_NK: Array, scale_NG: Array, q_MK: Array, step_MG: F32) -> F32:
    """out = fma(float(acc), scale * step, out), a group after the other."""
    groups = scale_NG.shape[1]
    out = np.zeros((len(q_MK), len(values_NK)), np.float32)
    size = values_NK.shape[1] // groups
    for g in range(groups):
        at = slice(g * size, (g + 1) * size)
        acc = q_MK[:, at].astype(np.int64) @ values_NK[:, at].astype(np.int64).T
        scale = scale_NG[:, g].astype(np.float32)[None, :] * step_MG[:, g][:, None]
        out = fma(acc.astype(np.float32), scale, out)
    return out


def matrix(rng: np.random.Generator, form: str, n: int, k: int) -> tuple[Array, Array]:
    """Random values [n, k], and the rows that hold them."""
    if form == "int8":
        values = rng.integers(-127, 128, (n, k), dtype=np.int8)
        return values, values
    values = rng.integers(-1, 2, (n, k), dtype=np.int8)
    return values, pack(values, form)


def check(isa: str, form: str, m: int, n: int, k: int, group: int, half: bool) -> None:
    """One random product against the definition."""
    rng = np.random.default_rng([m, n, k, group, half])
    values, rows = matrix(rng, form, n, k)
    scale = rng.normal(0, 0.05, (n, k // group)).astype(np.float16 if half else np.float32)
    q = rng.integers(-127, 128, (m, k), dtype=np.int8)
    step = rng.uniform(1e-4, 1e-1, (m, k // group)).astype(np.float32)
    found = kernels_of(isa).Panels(isa, form, rows, scale, k).product(q, step)
    wanted = expected(values, scale, q, step)
    np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))


def test_the_definition_rounds_once() -> None:
    """Where a float64 sum lies half-way between two float32, what it lost decides."""
    one, tiny = np.float32(1), np.float32(2.0**-60)
    half = np.float32(2.0**-24)  # half a unit of 1
    assert fma(np.array([one]), np.array([half + 0]), np.array([one]))[0] == one  # tie to even
    above = fma(np.array([half]), np.array([one + np.float32(2.0**-23)]), np.array([one]))
    assert above[0] == np.nextafter(one, np.float32(2))
    assert fma(np.array([tiny]), np.array([tiny]), np.array([one]))[0] == one


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
def test_equals_the_definition(isa: str, form: str, group: int) -> None:
    for m in TOKENS:
        for n in ROWS if m < 6 else (17, 50):
            check(isa, form, m, n, group * (3 if group < 256 else 2), group, half=(m + n) % 2 == 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
def test_long_rows_are_opened_in_blocks(isa: str, form: str) -> None:
    for m, group in ((1, 128), (3, 32), (40, 128), (5, 32)):
        check(isa, form, m, 34, 1280, group, half=True)


@pytest.mark.parametrize("k", [1, 3, 31, 32, 33, 64, 100, 200, 1281])
@pytest.mark.parametrize("isa", ISAS)
def test_one_scale_a_row_of_int8(isa: str, k: int) -> None:
    for m in (1, 2, 4, 5, 18, 33):
        check(isa, "int8", m, 35, k, k, half=False)


@pytest.mark.parametrize("m", [1, 3, 7])
@pytest.mark.parametrize("isa", ISAS)
def test_extremes_do_not_overflow(isa: str, m: int) -> None:
    """Constant q and values drive every partial sum to its bound."""
    for form, bounds in (("2bit", (-1, 1)), ("int8", (-128, 127))):
        for group in (128, 256):
            for value in bounds:
                for q_value in (-127, 127):
                    values = np.full((16, 512), value, np.int8)
                    q = np.full((m, 512), q_value, np.int8)
                    rows = values if form == "int8" else pack(values, form)
                    ones = np.ones((16, 512 // group), np.float32)
                    steps = np.ones((m, 512 // group), np.float32)
                    found = kernels_of(isa).Panels(isa, form, rows, ones, 512).product(q, steps)
                    np.testing.assert_array_equal(found, np.float32(512 * value * q_value))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("isa", ISAS)
def test_each_weight_meets_its_own_activation(isa: str, m: int, form: str) -> None:
    """One-hot rows read single activations back: a permuted layout cannot hide behind sums."""
    k = 192
    q = np.random.default_rng(5).integers(-127, 128, (m, k), dtype=np.int8)
    eye = np.eye(k, dtype=np.int8)
    scale, step = np.ones((k, k // 64), np.float16), np.ones((m, k // 64), np.float32)
    rows = eye if form == "int8" else pack(eye, form)
    found = kernels_of(isa).Panels(isa, form, rows, scale, k).product(q, step)
    np.testing.assert_array_equal(found, q.astype(np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_values_are_read_back(form: str) -> None:
    """The rows of a tied embedding come out of the panels."""
    rng = np.random.default_rng(8)
    values, rows = matrix(rng, form, 21, 256)
    scale = rng.uniform(-1, 1, (21, 4)).astype(np.float16)
    panels = kernels_of("scalar").Panels("scalar", form, rows, scale, 256)
    for row in (0, 15, 16, 20):
        wanted = values[row].astype(np.float32) * np.repeat(scale[row].astype(np.float32), 64)
        np.testing.assert_array_equal(panels.values(row), wanted)


def float_sums(x_MK: F32, w_NK: F32) -> F32:
    """16 lanes of fused products in the order of the inputs, then folded by halves."""
    m, k = x_MK.shape
    lanes = np.zeros((m, len(w_NK), 16), np.float32)
    for i in range(0, k, 16):
        x, w = x_MK[:, None, i : i + 16], w_NK[None, :, i : i + 16]
        lanes[..., : x.shape[-1]] = fma(x, w, lanes[..., : x.shape[-1]])
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


@pytest.mark.parametrize("form", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("isa", ISAS)
def test_float_rows_equal_the_definition(isa: str, form: str) -> None:
    rng = np.random.default_rng(3)
    for m, n, k in ((1, 1, 1), (1, 9, 15), (3, 17, 16), (5, 33, 100), (2, 8, 257)):
        x = rng.standard_normal((m, k)).astype(np.float32)
        w = rng.standard_normal((n, k)).astype(np.float32)
        w[0, 0] = 2.0**-20  # below float16's normal values
        stored: Array = w
        if form == "f16":
            stored = w.astype(np.float16)
            w = stored.astype(np.float32)
        elif form == "bf16":
            stored = (w.view(np.uint32) >> 16).astype(np.uint16)
            w = (stored.astype(np.uint32) << 16).view(np.float32)
        found = kernels_of(isa).float_product(isa, x, stored)
        np.testing.assert_array_equal(found.view(np.int32), float_sums(x, w).view(np.int32))
