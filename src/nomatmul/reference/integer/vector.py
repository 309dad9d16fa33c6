"""Vectors: norms' sums, quantisers and what turns accumulators into fixed point.

x is int64 [..., K] of VB bits, w int64 [K] (or [..., K]) of weight_bits: a norm's weights with an
exponent of the whole vector, which only constants know, so results are in units of x times units of
w. Scalars have the leading shape [...]. K may be at most 2^16.

With |x| < 2^31 and |w| < 2^17 a product has less than 49 bits.
"""

from __future__ import annotations

import numpy as np

from nomatmul.reference.integer.numerics import ACTIVATION_MAX, Int, saturate, shift, shift_rounded
from nomatmul.reference.integer.scalar import Scalar, from_int, normal, top18

# Each element of the weight of a norm without weights.
ONES = 1 << 14
# Bits by which the largest product is cut below a mantissa: |u| <= 2^16.
_DROPPED = 8
# Of `rescale`, in hardware a barrel shifter: no wider to the left, and all zero further right.
_LEFT_MOST, _RIGHT_MOST = 31, 62


def scan(x: Int, w: Int) -> Scalar:
    """max |x * w| over the last axis: the scale that `sumsq` and `quantise` ask for."""
    return from_int(np.abs(x * w).max(axis=-1))


def scaled(x: Int, w: Int, a: Scalar) -> tuple[Int, Int]:
    """(u = x * w >> sh int64 [..., K], sh [...]) with sh = e_a + 8, so that |u| <= 2^16."""
    right = np.asarray(a.e + _DROPPED)
    return shift(x * w, right[..., None]), right


def sumsq(x: Int, w: Int, a: Scalar) -> Scalar:
    """sum (x * w)^2 over the last axis, the products cut as in `scaled`; a = scan(x, w)."""
    u, right = scaled(x, w, a)
    total = np.where(a.m == 0, 0, (u * u).sum(axis=-1))
    return normal(total, 2 * right)


def quantise(x: Int, w: Int, a: Scalar, r: Scalar) -> Int:
    """int64 [..., K] in -127..127: 127 * x * w / a, to the nearest, ties up.

    a = scan(x, w), r = div(127, a). The products are cut to 17 bits, r to 18; the shift f behind
    their product is 26 or 27, whatever a. All zero where a is.
    """
    u, right = scaled(x, w, a)
    inverse, exponent = top18(r)
    f = np.where(a.m == 0, 1, -(exponent + right))
    q = shift_rounded(u * np.asarray(inverse)[..., None], np.asarray(f)[..., None])
    q = np.clip(q, -ACTIVATION_MAX, ACTIVATION_MAX)
    return np.where(np.asarray(a.m)[..., None] == 0, 0, q)


def rescale(acc: Int, factor: Scalar, fraction: int, bits: int) -> Int:
    """acc * factor in fixed point of `fraction` bits, to the nearest, ties up, saturated to `bits`.

    acc int64 [..., N] of at most 32 bits; factor [...], cut to 18 bits. What the shifter does not
    reach: further right than 62 is 0, and to the left it goes 31 at most.
    """
    m, e = (np.asarray(part)[..., None] for part in top18(factor))
    right = -(e + fraction)
    product = acc * m
    rounded = shift_rounded(product, np.clip(right, 0, _RIGHT_MOST))
    rounded = np.where(right > _RIGHT_MOST, 0, rounded)
    # clamped before it is shifted: int64 holds the result, and saturation is the same
    left = saturate(product, bits) << np.clip(-right, 0, _LEFT_MOST)
    return saturate(np.where(right > 0, rounded, left), bits)
