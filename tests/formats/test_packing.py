"""Packing: the documented bits, round trips over awkward shapes, and every illegal byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomatmul.formats.packing import PACKINGS, check_codes, pack_ternary, row_bytes, unpack_ternary

AWKWARD = [1, 2, 3, 4, 5, 6, 127, 128, 129, 159, 160, 161, 255, 256, 257, 319, 320, 321, 640]


def test_two_bit_layout_is_the_documented_one():
    t = np.int8([[-1, 0, 1, 1, 0, -1]])
    packed = pack_ternary(t, "2bit")
    assert packed.shape == (1, 32)
    # codes 0 1 2 2 | 1 0 then padding with code 1
    assert packed[0, 0] == 0 | 1 << 2 | 2 << 4 | 2 << 6
    assert packed[0, 1] == 1 | 0 << 2 | 1 << 4 | 1 << 6
    assert set(packed[0, 2:]) == {0b01010101}


def test_five_a_byte_layout_is_the_documented_one():
    packed = pack_ternary(np.int8([[1, 0, -1, 1, 1, -1]]), "1.6bit")
    assert packed.shape == (1, 32)
    value = 2 * 81 + 1 * 27 + 0 * 9 + 2 * 3 + 2
    assert packed[0, 0] == -(-value * 256 // 243)
    value = 0 * 81 + 27 + 9 + 3 + 1
    assert packed[0, 1] == -(-value * 256 // 243)


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("columns", AWKWARD)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_round_trip_over_awkward_shapes(form, columns, rows, rng):
    t = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
    packed = pack_ternary(t, form)
    assert packed.shape == (rows, row_bytes(columns, form))
    assert packed.shape[1] % 32 == 0
    np.testing.assert_array_equal(unpack_ternary(packed, columns, form), t)


@given(st.sampled_from(PACKINGS), st.integers(0, 5), st.integers(0, 400), st.integers(0, 2**32 - 1))
def test_round_trip_over_random_shapes(form, rows, columns, seed):
    t = np.random.default_rng(seed).integers(-1, 2, (rows, columns), dtype=np.int8)
    np.testing.assert_array_equal(unpack_ternary(pack_ternary(t, form), columns, form), t)


def test_round_trip_over_several_blocks_of_work(rng):
    t = rng.integers(-1, 2, (40_000, 300), dtype=np.int8)
    for form in PACKINGS:
        np.testing.assert_array_equal(unpack_ternary(pack_ternary(t, form), 300, form), t)


@pytest.mark.parametrize("form", PACKINGS)
def test_every_byte_is_either_read_as_it_was_written_or_refused(form):
    refused = 0
    for byte in range(256):
        row = np.full((1, 32), byte, dtype=np.uint8)
        columns = 32 * (4 if form == "2bit" else 5)
        try:
            t = unpack_ternary(row, columns, form)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(pack_ternary(t, form), row)
    assert refused == (256 - 81 if form == "2bit" else 13)


def test_code_three_is_refused():
    packed = pack_ternary(np.zeros((2, 128), np.int8), "2bit")
    packed[1, 7] |= 0b00001100
    with pytest.raises(ValueError, match="illegal code 3"):
        check_codes(packed, 128, "2bit")


@pytest.mark.parametrize("form", PACKINGS)
def test_wrong_padding_is_refused(form):
    packed = pack_ternary(np.zeros((2, 130), np.int8), form)
    packed[0, -1] = 0
    with pytest.raises(ValueError, match="padding behind 130 packed elements"):
        check_codes(packed, 130, form)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match=r"must lie in -1\.\.1, found 0\.\.2"):
        pack_ternary(np.int8([[0, 2]]), "2bit")
    with pytest.raises(ValueError, match="must be a matrix"):
        pack_ternary(np.int8([0]), "2bit")
    with pytest.raises(ValueError, match="packing '3bit' is unknown"):
        row_bytes(4, "3bit")
    with pytest.raises(ValueError, match="cannot have -1 elements"):
        row_bytes(-1, "2bit")
    with pytest.raises(ValueError, match=r"must be uint8 \[N, 32\]"):
        check_codes(np.zeros((1, 31), np.uint8), 5, "2bit")
