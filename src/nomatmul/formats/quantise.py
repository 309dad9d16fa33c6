"""The quantisers of docs/numerics.md: absmean for weights, absmax for activations.

Legend: N rows (out_features), K columns (in_features); `...` any leading shape (tokens).
Source: arXiv 2406.02528, section 3.2, and its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

SCALE_FLOOR = np.float32(1e-5)
INT8_MAX = np.float32(127.0)


def absmean_scale(weight_NK: NDArray[np.floating] | Iterable[NDArray[np.floating]]) -> np.float32:
    """Return max(mean |W|, 1e-5) as float32, the mean taken in float64.

    `weight_NK` is a matrix or an iterable of blocks of its rows: both give the same bits, since
    rows are summed one by one and the row sums are added exactly.
    Raises ValueError for a weight that is not finite or has no elements.
    """
    blocks = [weight_NK] if isinstance(weight_NK, np.ndarray) else weight_NK
    row_sums: list[float] = []
    count = 0
    for block in blocks:
        rows = np.ascontiguousarray(block, dtype=np.float32)
        rows = rows.reshape(-1, rows.shape[-1]) if rows.ndim else rows.reshape(1, 1)
        row_sums.extend(float(np.sum(np.abs(row), dtype=np.float64)) for row in rows)
        count += rows.size
    if count == 0:
        raise ValueError("a weight without elements has no absmean scale")
    mean = math.fsum(row_sums) / count
    if not math.isfinite(mean):
        raise ValueError("the weight holds a value that is not finite")
    return max(np.float32(mean), SCALE_FLOOR)


def absmean_groups(weight_NK: NDArray[np.floating], group: int) -> NDArray[np.float32]:
    """Return mean |W|, at least 1e-5, of each `group` inputs of each row: float32 [N, K / group].

    Raises ValueError for a weight that is not finite.
    """
    cut = np.abs(np.asarray(weight_NK, np.float64)).reshape(len(weight_NK), -1, group)
    mean = cut.mean(axis=-1)
    if not np.all(np.isfinite(mean)):
        raise ValueError("the weight holds a value that is not finite")
    scale: NDArray[np.float32] = np.maximum(mean.astype(np.float32), SCALE_FLOOR)
    return scale


def ternarise(
    weight: NDArray[np.floating], scale: np.float32 | NDArray[np.float32]
) -> NDArray[np.int8]:
    """Return clip(round_half_even(W * (1 / scale)), -1, 1) as int8, of the shape of `weight`.

    The reciprocal is rounded to float32 first, then the product, as the published code does.
    """
    inverse = np.float32(1.0) / np.asarray(scale, dtype=np.float32)
    scaled = np.asarray(weight, dtype=np.float32) * inverse
    t: NDArray[np.int8] = np.clip(np.rint(scaled), -1, 1).astype(np.int8)
    return t


def quantise_weight(weight_NK: NDArray[np.floating]) -> tuple[NDArray[np.int8], np.float32]:
    """Return (ternary int8 [N, K], scale float32) of a weight: W is close to ternary * scale.

    Raises ValueError for a weight that is not finite or has no elements.
    """
    scale = absmean_scale(weight_NK)
    return ternarise(weight_NK, scale), scale


def round_half_away(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to the nearest integer, ties away from zero, as float32.

    Not floor(v + 0.5): that sum rounds 0.49999997 up to 1.
    """
    whole = np.trunc(values)
    far = np.abs(values - whole) >= np.float32(0.5)
    return np.where(far, whole + np.sign(values), whole).astype(np.float32)


def round_half_up(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """floor(v + 0.5), the sum rounded to float32: 0.49999997 goes up to 1."""
    up: NDArray[np.float32] = np.floor(values + np.float32(0.5))
    return up


# Where the ties of an activation quantiser go (the dial `rounding`).
ROUND: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "away": round_half_away,
    "even": np.rint,
    "up": round_half_up,
}


def quantise_activation(
    y: NDArray[np.float32], rounding: str = "away"
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise float32 [..., K] to (int8 [..., K], step float32 [..., 1]).

    a = max(max|y|, 1e-5) per token; q = clip(round(y * (127 / a)), -128, 127); step = a / 127, so
    that y is close to q * step. Raises ValueError if y is not finite.
    """
    y = np.asarray(y, dtype=np.float32)
    peak = np.max(np.abs(y), axis=-1, keepdims=True, initial=0.0)
    if not np.all(np.isfinite(peak)):
        raise ValueError("an activation is not finite")
    peak = np.maximum(peak.astype(np.float32), SCALE_FLOOR)
    scaled = y * (INT8_MAX / peak)
    q = np.clip(ROUND[rounding](scaled), -128, 127).astype(np.int8)
    return q, peak / INT8_MAX


def quantise_groups(
    y: NDArray[np.float32], group: int, rounding: str = "even"
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise each `group` elements of float32 [..., K] alone, as `quantise_activation` does.

    Returns (int8 [..., K], step float32 [..., K / group]).
    """
    q, step = quantise_activation(y.reshape(*y.shape[:-1], -1, group), rounding)
    return q.reshape(y.shape), step[..., 0]


def dequantised(
    values: NDArray[np.int8] | NDArray[np.float32], scale: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """The floats of a matrix [N, K] or of other rows: values * scale, rounded once; values without
    scales are those floats.

    scale: one a row [N], or [N, groups]; of fewer elements than rows: the rows are split evenly
    over them.
    """
    floats = values.astype(np.float32, copy=scale is not None)
    if scale is None:
        return floats
    if scale.ndim == values.ndim:
        cut = floats.reshape(*scale.shape, -1)
        cut *= scale[..., None]
        return cut.reshape(values.shape)
    floats *= np.repeat(scale, len(values) // len(scale), axis=0)[..., None]
    return floats


def quantise_rows(
    rows: NDArray[np.floating],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise rows [..., K] to (int8 [..., K], scale float32 [...]); value = int8 * scale.

    scale = absmax / 127, at least 1e-5 / 127; ties round to even. This form is storage only.
    """
    values = np.asarray(rows, dtype=np.float32)
    peak = np.maximum(np.max(np.abs(values), axis=-1, initial=0.0), SCALE_FLOOR)
    scale = peak.astype(np.float32) / INT8_MAX
    q = np.clip(np.rint(values / scale[..., None]), -127, 127).astype(np.int8)
    return q, scale


def to_bfloat16(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Return the bfloat16 bits of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= 16
    return rounded.astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits (exact)."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def from_float8(bits: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Return the float32 values of 8-bit floats (exact); dtype: "F8_E4M3" (the kind without
    infinities) or "F8_E5M2"."""
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    assert dtype == "F8_E4M3"
    sign, size = (bits & 0x80).astype(np.uint16) << 8, (bits & 0x7F).astype(np.uint16) << 7
    values = (sign | size).view(np.float16).astype(np.float32)
    values *= np.float32(256.0)  # the biases are 15 and 7
    values[(bits & 0x7F) == 0x7F] = np.nan
    return values


def to_float16(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Round to float16, ties to even; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype("<f2")


def fits_float16(values: NDArray[np.floating]) -> bool:
    """Whether float16 holds every value exactly."""
    return bool(np.array_equal(to_float16(values).astype(values.dtype), values))


def from_float16(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return float16 values as float32 (exact): a third of the time that numpy takes."""
    bits = values.view(np.uint16).astype(np.uint32)
    sign = bits & np.uint32(0x8000)
    sign <<= 16
    bits &= np.uint32(0x7FFF)
    if bits.size and bits.max() >= 0x7C00:  # infinity and NaN
        return values.astype(np.float32)
    bits <<= 13
    # exponent and mantissa in place, but for the bias of the exponent; subnormals come out too
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    bits |= sign
    return wide
