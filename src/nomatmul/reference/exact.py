"""Float sums of decoders with attention, in the order of docs/numerics.md: explicit fused
multiply-adds and fixed lanes, so that they equal the native core's bit for bit.

Legend: K inputs, N outputs, T tokens, S positions, H heads, G heads of keys and values, E head
size; `...` any leading shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nomatmul.reference.activations import Float, exp_poly

LANES = 16
LEAST = np.float32(-88.0)  # below, an exponential counts as 0


def fma(a: Float, b: Float, c: Float) -> Float:
    """float32 a * b + c, rounded once.

    The product of two float32 is exact in float64, so their sum there is rounded once, and to
    float32 a second time. That goes wrong only where the first rounding ends on the middle of two
    float32; there the sum is rounded to odd, off the middle and to the side of the exact value.
    """
    product = a.astype(np.float64) * b
    addend = c.astype(np.float64)
    total = np.atleast_1d(product + addend)
    bits = total.view(np.int64)
    middle = (bits & _BELOW_FLOAT32 == _HALF_OF_FLOAT32) | (np.abs(total) < _FEWER_BITS)
    if middle.any():
        shape = total.shape
        terms = (np.broadcast_to(term, shape)[middle] for term in (product, addend))
        total[middle] = _rounded_to_odd(*terms)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, as it does there
        result: Float = total.astype(np.float32)
    return result


# The bits that float64 has and float32 has not, and their value in the middle of two float32.
_BELOW_FLOAT32, _HALF_OF_FLOAT32 = np.int64((1 << 29) - 1), np.int64(1 << 28)
_FEWER_BITS = 2.0**-125  # smaller float32 have fewer bits, and their middles lie elsewhere


def _rounded_to_odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a + b: where float64 cannot hold it, that neighbour whose last bit is 1. float64 has more
    than two bits to spare, so rounding that to float32 is rounding the exact sum."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    bits = total.view(np.int64)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(error)
    outwards = (error > 0) == (total > 0)
    return np.where(inexact, np.where(outwards, bits + 1, bits - 1), bits).view(np.float64)


def halved(lanes: Float) -> Float:
    """The sum over the last axis, of 16 lanes: lane[i] += lane[i + 8], then 4, 2, 1."""
    width = lanes.shape[-1]
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def float_product(x: Float, weight_NK: Float) -> Float:
    """x [..., K] @ weight^T as [..., N]: lane[k % 16] = fma(x[k], w[n, k], lane[k % 16]) for rising
    k, from 0; then the lanes in halves."""
    rows = x.reshape(-1, x.shape[-1])
    out = np.empty((len(rows), len(weight_NK)), np.float32)
    for row, x_K in enumerate(rows):
        lanes = np.zeros((len(weight_NK), LANES), np.float32)
        for k in range(0, weight_NK.shape[1], LANES):
            part = weight_NK[:, k : k + LANES]
            width = part.shape[1]
            lanes[:, :width] = fma(x_K[k : k + width], part, lanes[:, :width])
        out[row] = halved(lanes)
    return out.reshape(*x.shape[:-1], -1)


def attend(q_BTHE: Float, k_BSGE: Float, v_BSGE: Float, allowed_BTS: NDArray[np.bool_]) -> Float:
    """Causal attention as [B, T, H*E]; each head of keys and values serves H / G heads of queries.

    score[s] = (fma over rising e, from 0, of q[e] * k[s, e]) * float32(1 / sqrt(E))
    w[s] = exp(score[s] - max), 0 below exp(-88); sum: lane[s % 16] += w[s], then halves
    out[e] = (fma over rising s, from 0, of w[s] * v[s, e]) / sum
    Positions that are not allowed have w = 0; where none is allowed, zeros.
    """
    batch, steps, heads, size = q_BTHE.shape
    total = k_BSGE.shape[1]
    k_BHSE, v_BHSE = (
        np.repeat(x, heads // x.shape[2], axis=2).swapaxes(1, 2) for x in (k_BSGE, v_BSGE)
    )
    q_BHTE = q_BTHE.swapaxes(1, 2)
    scores = np.zeros((batch, heads, steps, total), np.float32)
    for e in range(size):
        scores = fma(q_BHTE[..., e, None], k_BHSE[:, :, None, :, e], scores)
    scores *= np.float32(1.0 / np.sqrt(np.float64(size)))
    allowed = allowed_BTS[:, None]
    peak = np.where(allowed, scores, np.float32(-np.inf)).max(axis=-1, keepdims=True)
    below = scores - np.where(np.isfinite(peak), peak, np.float32(0))
    counted = allowed & (below >= LEAST)
    weights = np.where(counted, exp_poly(np.where(counted, below, LEAST)), np.float32(0))
    lanes = np.zeros((*weights.shape[:-1], LANES), np.float32)
    out = np.zeros((batch, heads, steps, size), np.float32)
    for s in range(total):
        lanes[..., s % LANES] += weights[..., s]
        out = fma(weights[..., s, None], v_BHSE[:, :, None, s], out)
    sums = halved(lanes)[..., None]
    out = np.where(sums > 0, out / np.where(sums > 0, sums, np.float32(1)), np.float32(0))
    return out.swapaxes(1, 2).reshape(batch, steps, -1)
