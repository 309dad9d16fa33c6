"""acc = q @ t.T must be equal, integer for integer, on every instruction set.

Legend: M tokens, K inputs, N output rows. The oracle is numpy's int64 product.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from parity_backends import ISAS, PACKINGS, kernels_of, native, pack

POISON = -559038737

TOKENS = (0, 1, 2, 3, 4, 5, 6, 15, 16, 17, 33, 49)
ROWS = (0, 1, 15, 16, 17, 63, 65)
COLUMNS = (1, 3, 4, 5, 127, 128, 129, 255, 257, 640, 1281, 6912)


def oracle(q_MK: NDArray[np.int8], t_NK: NDArray[np.int8]) -> NDArray[np.int32]:
    """Return q @ t.T, exact (float64 holds integers below 2^53)."""
    return (q_MK.astype(np.float64) @ t_NK.astype(np.float64).T).astype(np.int32)


def operands(m: int, n: int, k: int, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return random q over the whole int8 range and random ternary t."""
    rng = np.random.default_rng([m, n, k, seed])
    q_MK = rng.integers(-128, 128, (m, k), dtype=np.int8)
    t_NK = rng.integers(-1, 2, (n, k), dtype=np.int8)
    return q_MK, t_NK


def run(
    isa: str,
    form: str,
    q_MK: NDArray[np.int8],
    t_NK: NDArray[np.int8],
    rows: tuple[int, int] | None = None,
    spare: int = 0,
) -> NDArray[np.int32]:
    """Return the kernel's output, [M, N + spare], poisoned before the call."""
    out = np.full((q_MK.shape[0], t_NK.shape[0] + spare), POISON, dtype=np.int32)
    n0, n1 = rows if rows is not None else (0, t_NK.shape[0])
    kernels_of(isa).product(isa, form, pack(t_NK, form), q_MK, None, out, n0, n1)
    return out


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("isa", ISAS)
def test_equals_the_oracle(isa: str, k: int, form: str) -> None:
    for m in TOKENS:
        for n in ROWS if k < 1000 else (1, 17, 65):
            q_MK, t_NK = operands(m, n, k)
            np.testing.assert_array_equal(run(isa, form, q_MK, t_NK), oracle(q_MK, t_NK))


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_more_tokens_than_a_block(isa: str, form: str) -> None:
    q_MK, t_NK = operands(300, 70, 2600)
    np.testing.assert_array_equal(run(isa, form, q_MK, t_NK), oracle(q_MK, t_NK))


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("isa", ISAS)
def test_extremes_do_not_overflow(isa: str, m: int, form: str) -> None:
    """Constant q and t drive every 16-bit partial sum to its bound."""
    for k in (2560, 6912):
        for value in (-128, 127):
            for weight in (-1, 0, 1):
                q_MK = np.full((m, k), value, dtype=np.int8)
                t_NK = np.full((9, k), weight, dtype=np.int8)
                expected = np.full((m, 9), value * weight * k, dtype=np.int32)
                np.testing.assert_array_equal(run(isa, form, q_MK, t_NK), expected)


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_each_weight_meets_its_own_activation(isa: str, form: str) -> None:
    """One-hot rows read single activations back: a permuted layout cannot hide behind sums."""
    k = 700
    q_MK = np.random.default_rng(5).integers(-128, 128, (2, k), dtype=np.int8)
    for sign in (-1, 1):
        t_NK = (sign * np.eye(k)).astype(np.int8)
        np.testing.assert_array_equal(run(isa, form, q_MK, t_NK), sign * q_MK.astype(np.int32))


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("m", [1, 3, 5, 16, 33])
@pytest.mark.parametrize("isa", ISAS)
def test_writes_only_its_rows(isa: str, m: int, form: str) -> None:
    q_MK, t_NK = operands(m, 65, 257)
    expected = oracle(q_MK, t_NK)
    for n0, n1 in ((0, 65), (0, 1), (3, 3), (5, 22), (16, 48), (64, 65)):
        out = run(isa, form, q_MK, t_NK, rows=(n0, n1), spare=7)
        np.testing.assert_array_equal(out[:, n0:n1], expected[:, n0:n1])
        assert (out[:, :n0] == POISON).all()
        assert (out[:, n1:] == POISON).all()


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("m", [1, 4, 7, 20])
@pytest.mark.parametrize("isa", ISAS)
def test_scaled_output_is_one_product_of_floats(isa: str, m: int, form: str) -> None:
    q_MK, t_NK = operands(m, 21, 640)
    scale_M = np.random.default_rng(m).uniform(1e-4, 1e-2, m).astype(np.float32)
    out_MN = np.full((m, 24), np.nan, dtype=np.float32)
    kernels_of(isa).product(isa, form, pack(t_NK, form), q_MK, scale_M, out_MN, 2, 21)
    expected = oracle(q_MK, t_NK).astype(np.float32) * scale_M[:, None]
    np.testing.assert_array_equal(out_MN[:, 2:21].view(np.int32), expected[:, 2:].view(np.int32))
    assert np.isnan(out_MN[:, :2]).all()
    assert np.isnan(out_MN[:, 21:]).all()


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_random_shapes(isa: str, form: str) -> None:
    rng = np.random.default_rng(zlib.crc32(f"{isa} {form}".encode()))
    for seed in range(30):
        m, n, k = int(rng.integers(1, 40)), int(rng.integers(1, 80)), int(rng.integers(1, 1500))
        q_MK, t_NK = operands(m, n, k, seed)
        np.testing.assert_array_equal(run(isa, form, q_MK, t_NK), oracle(q_MK, t_NK))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_may_be_longer_than_needed(isa: str) -> None:
    """A row stride beyond the padded length: what lies between rows is not read as weights."""
    q_MK, t_NK = operands(5, 9, 130)
    packed = pack(t_NK, "2bit")
    wide = np.full((9, packed.shape[1] + 32), 0xAA, dtype=np.uint8)
    wide[:, : packed.shape[1]] = packed
    out = np.empty((5, 9), dtype=np.int32)
    kernels_of(isa).product(isa, "2bit", wide, q_MK, None, out, 0, 9)
    np.testing.assert_array_equal(out, oracle(q_MK, t_NK))


@pytest.mark.parametrize("isa", ISAS)
def test_illegal_codes_are_found(isa: str) -> None:
    kernels = kernels_of(isa)
    legal_pairs = [b for b in range(256) if all((b >> s) & 3 != 3 for s in (0, 2, 4, 6))]
    legal_fives = {(v * 256 + 242) // 243 for v in range(243)}
    for form, legal in (("2bit", set(legal_pairs)), ("1.6bit", legal_fives)):
        good = np.resize(np.array(sorted(legal), dtype=np.uint8), 9000)
        assert kernels.codes_ok(isa, form, good)
        for byte in set(range(256)) - legal:
            bad = good.copy()
            bad[(byte * 37) % 9000] = byte
            assert not kernels.codes_ok(isa, form, bad), f"{form}: byte {byte} was accepted"


def test_bad_shapes_are_refused() -> None:
    kernels = native()
    q_MK, t_NK = operands(2, 4, 300)
    packed = pack(t_NK, "2bit")
    out = np.zeros((2, 4), dtype=np.int32)
    with pytest.raises(ValueError, match=r'isa "avx9" is not available here; available:.* scalar'):
        kernels.product("avx9", "2bit", packed, q_MK, None, out, 0, 4)
    with pytest.raises(ValueError, match='packing "3bit"'):
        kernels.product("scalar", "3bit", packed, q_MK, None, out, 0, 4)
    with pytest.raises(ValueError, match="rows of 32 bytes; k = 300 needs 96"):
        kernels.product("scalar", "2bit", packed[:, :32].copy(), q_MK, None, out, 0, 4)
    with pytest.raises(ValueError, match="rows 0 to 5 leave w's 4"):
        kernels.product("scalar", "2bit", packed, q_MK, None, out, 0, 5)
    with pytest.raises(ValueError, match="out must be"):
        kernels.product("scalar", "2bit", packed, q_MK, None, out[:, :2].copy(), 0, 4)
    with pytest.raises(ValueError, match="int32 without"):
        kernels.product("scalar", "2bit", packed, q_MK, None, out.astype(np.float32), 0, 4)
