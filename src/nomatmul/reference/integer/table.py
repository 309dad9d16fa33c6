"""The sigmoid by a table with linear interpolation, and silu on top of it.

z is int64 of VF fraction bits. sigmoid has GATE_FRACTION (16) fraction bits and lies in 0..65536.
"""

from __future__ import annotations

import functools

import numpy as np

from nomatmul.reference.integer.numerics import (
    GATE_FRACTION,
    TABLE_SPAN_BITS,
    Formats,
    Int,
    shift_rounded,
)


@functools.lru_cache(maxsize=16)
def sigmoid_table(table_bits: int) -> Int:
    """round(sigmoid * 2^16) at 0, 1/32, ..., 16 (with 2^9 steps): int64 [2^table_bits + 1]."""
    z = np.arange((1 << table_bits) + 1) / (1 << (table_bits - TABLE_SPAN_BITS))
    table: Int = np.rint((1 << GATE_FRACTION) / (1 + np.exp(-z))).astype(np.int64)
    table.flags.writeable = False
    return table


def sigmoid(z: Int, formats: Formats) -> Int:
    """1 / (1 + exp(-z)) with 16 fraction bits: between two entries on a line, to the nearest.

    |z| is clamped to just below 16; sigmoid(-z) = 2^16 - sigmoid(z). The error is below 2^-15.
    """
    between = formats.table_shift
    size = np.minimum(np.abs(z), (1 << (formats.vector_fraction + TABLE_SPAN_BITS)) - 1)
    table = sigmoid_table(formats.table_bits)
    at, rest = size >> between, size & ((1 << between) - 1)
    value: Int = table[at] + shift_rounded((table[at + 1] - table[at]) * rest, between)
    return np.where(z < 0, (1 << GATE_FRACTION) - value, value)


def silu(z: Int, formats: Formats) -> Int:
    """z * sigmoid(z), VF fraction bits as z, to the nearest."""
    return shift_rounded(z * sigmoid(z, formats), GATE_FRACTION)
