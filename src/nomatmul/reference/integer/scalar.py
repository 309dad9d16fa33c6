"""Scalars: numbers >= 0 with 24 bits of mantissa and an exponent, and the five operations on them.

A scalar (m, e) stands for m * 2^e. It is 0 as (0, 0), and otherwise normal: 2^23 <= m < 2^24. Every
operation truncates: its result is the largest scalar that is not above the exact one (of an
addition: of the exact sum of the operand that is larger and the other one, truncated to its unit).
An exponent outside -512..511 saturates; hardware flags it, and no model that `bounds` lets pass
comes near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nomatmul.reference.integer.numerics import (
    EXPONENT_LEAST,
    EXPONENT_MOST,
    FACTOR_BITS,
    MANTISSA_BITS,
    Int,
)


@dataclass(frozen=True)
class Scalar:
    """m int64 [...], 24 bits unsigned; e int64 [...], the exponent, 10 bits signed."""

    m: Int
    e: Int

    @classmethod
    def of(cls, values: ArrayLike) -> Scalar:
        """The nearest scalars to constants [...], ties to even.

        Raises ValueError for one that is negative, not finite or out of the exponents' range.
        """
        value = np.asarray(values, np.float64)
        bad = ~(np.isfinite(value) & (value >= 0))
        if bad.any():
            raise ValueError(
                f"a constant of the integer model is {value[bad].flat[0]}, it must be 0 or above"
            )
        fraction, exponent = np.frexp(value)
        n = np.rint(np.ldexp(fraction, MANTISSA_BITS)).astype(np.int64)
        made = normal(n, exponent.astype(np.int64) - MANTISSA_BITS)
        far = (made.e <= EXPONENT_LEAST) | (made.e >= EXPONENT_MOST)
        if far.any():
            raise ValueError(
                f"a constant of the integer model is {value[far].flat[0]}: it needs an exponent"
                f" beyond {EXPONENT_LEAST}..{EXPONENT_MOST}"
            )
        return made

    def array(self) -> Int:
        """int64 [..., 2]: (m, e), as traces hold them."""
        return np.stack(np.broadcast_arrays(self.m, self.e), axis=-1).astype(np.int64)


def normal(n: Int, e: Int) -> Scalar:
    """The scalar of n * 2^e, n in 0 .. 2^62: cut to 24 bits, or shifted up to them."""
    n = np.asarray(n, np.int64)
    excess = bit_length(n) - MANTISSA_BITS
    m = (n >> np.maximum(excess, 0)) << np.maximum(-excess, 0)
    exponent = np.clip(np.asarray(e, np.int64) + excess, EXPONENT_LEAST, EXPONENT_MOST)
    return Scalar(m, np.where(n == 0, 0, exponent))


def bit_length(n: Int) -> Int:
    """Bits of n >= 0; 0 of 0."""
    length = np.frexp(n.astype(np.float64))[1].astype(np.int64)
    # float64 may have rounded up to the next power of two
    over = (length > 0) & ((n >> np.maximum(length - 1, 0)) == 0)
    bits: Int = length - over
    return bits


def from_int(n: Int) -> Scalar:
    """n >= 0, of at most 62 bits."""
    return normal(n, np.zeros((), np.int64))


def mul(a: Scalar, b: Scalar) -> Scalar:
    """a * b."""
    return normal(a.m * b.m, a.e + b.e)


def add(a: Scalar, b: Scalar) -> Scalar:
    """a + b: the smaller one is shifted to the exponent of the larger, truncated."""
    a_large = (b.m == 0) | ((a.m != 0) & (a.e >= b.e))
    large_m, small_m = np.where(a_large, a.m, b.m), np.where(a_large, b.m, a.m)
    large_e, small_e = np.where(a_large, a.e, b.e), np.where(a_large, b.e, a.e)
    apart: Int = np.where(small_m == 0, 0, np.minimum(large_e - small_e, MANTISSA_BITS))
    return normal(large_m + (small_m >> apart), large_e)


def div(a: Scalar, b: Scalar) -> Scalar:
    """a / b; 0 where b is 0."""
    quotient: Int = (a.m << MANTISSA_BITS) // np.where(b.m == 0, 1, b.m)
    return normal(np.where(b.m == 0, 0, quotient), a.e - b.e - MANTISSA_BITS)


def sqrt(a: Scalar) -> Scalar:
    """The square root of a."""
    odd = a.e & 1
    # below 2^49, so float64 is off by one at most, and only where a root is all but whole
    wide = (a.m << odd) << MANTISSA_BITS
    near = np.sqrt(wide.astype(np.float64)).astype(np.int64)
    root: Int = near - (near * near > wide) + ((near + 1) * (near + 1) <= wide)
    return normal(root, (a.e - odd - MANTISSA_BITS) >> 1)


def top18(a: Scalar) -> tuple[Int, Int]:
    """(m, e) of the upper 18 bits of the mantissa: what a multiplier of vectors takes."""
    drop = MANTISSA_BITS - FACTOR_BITS
    return a.m >> drop, a.e + drop
