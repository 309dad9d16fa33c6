"""Widths of the integer model: how many bits a number has, and how many of them are fraction.

A number of F fraction bits is the integer n that stands for n / 2^F. `>>` is an arithmetic shift
(floor), and saturation clamps to the whole two's complement range of a width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]

# What no parameter changes: mantissas of scalars, the factor of `rescale` and `quantise`, gates,
# the span of the sigmoid's table, activations.
MANTISSA_BITS = 24
FACTOR_BITS = 18
GATE_FRACTION = 16
TABLE_SPAN_BITS = 4
ACTIVATION_MAX = 127
EXPONENT_LEAST, EXPONENT_MOST = -512, 511
# A fraction that a bound leaves free is no larger than this.
FRACTION_MOST = 20

_RANGES = {
    "vector_bits": (16, 32),
    "vector_fraction": (6, 20),
    "state_bits": (12, 32),
    "state_fraction": (6, 24),
    "weight_bits": (4, 18),
    "sum_bits": (12, 32),
    "table_bits": (5, 12),
}


@dataclass(frozen=True)
class Formats:
    """The widths that are parameters.

    vector_bits, vector_fraction: of vector memory and of what enters a gate (VB, VF). state_bits,
    state_fraction: of a recurrence's state (SB, HF >= VF). weight_bits: of a norm's weights, with
    one exponent a vector. sum_bits: of the accumulators of ternary products. table_bits: the
    sigmoid's table has 2^table_bits steps over [0, 16).
    Raises ValueError for a width out of its range, or widths that contradict each other.
    """

    vector_bits: int = 24
    vector_fraction: int = 12
    state_bits: int = 24
    state_fraction: int = 12
    weight_bits: int = 16
    sum_bits: int = 24
    table_bits: int = 9

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}, it must be a whole number {least}..{most}")
        if self.vector_fraction >= self.vector_bits - TABLE_SPAN_BITS:
            raise ValueError(
                f"vector_fraction is {self.vector_fraction}; of vector_bits {self.vector_bits} it"
                f" must leave {TABLE_SPAN_BITS} bits and the sign to whole numbers"
            )
        if self.state_fraction < self.vector_fraction:
            raise ValueError(
                f"state_fraction is {self.state_fraction}, it must be at least vector_fraction"
                f" {self.vector_fraction}"
            )
        if self.state_fraction > self.state_bits - 2:
            raise ValueError(
                f"state_fraction is {self.state_fraction}, of state_bits {self.state_bits} it may"
                f" be {self.state_bits - 2} at most"
            )
        if self.table_shift < 1:
            raise ValueError(
                f"table_bits is {self.table_bits}, with vector_fraction {self.vector_fraction} it"
                f" may be {self.vector_fraction + TABLE_SPAN_BITS - 1} at most"
            )

    @property
    def table_shift(self) -> int:
        """Bits of a number that lie between two entries of the sigmoid's table."""
        return self.vector_fraction - (self.table_bits - TABLE_SPAN_BITS)

    def replace(self, **widths: int) -> Formats:
        """Other widths; raises ValueError as the constructor."""
        return dataclasses.replace(self, **widths)


def saturate(values: Int, bits: int) -> Int:
    """Clamp to a signed range of `bits` bits: -2^(bits-1) .. 2^(bits-1) - 1."""
    limit = 1 << (bits - 1)
    return np.clip(values, -limit, limit - 1)


def shift(values: Int, right: int | Int) -> Int:
    """values >> right, rounded down; a negative `right` shifts to the left."""
    count = np.asarray(right, np.int64)
    shifted: Int = (values << np.maximum(-count, 0)) >> np.maximum(count, 0)
    return shifted


def shift_rounded(values: Int, right: int | Int) -> Int:
    """(values + half) >> right: to the nearest, ties up; right >= 0, and 0 leaves them."""
    count = np.asarray(right, np.int64)
    half = np.where(count > 0, np.left_shift(np.int64(1), np.maximum(count - 1, 0)), 0)
    rounded: Int = (values + half) >> count
    return rounded
