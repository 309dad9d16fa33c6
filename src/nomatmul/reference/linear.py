"""Linear layers: int8 matrices (ternary ones among them) with exact sums, and float ones.

Legend: K inputs, N outputs; `...` any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.quantise import from_bfloat16, quantise_activation, quantise_groups
from nomatmul.reference.activations import Float
from nomatmul.reference.exact import float_product, fma
from nomatmul.reference.ops import exact_product

# Both take float32 [..., K]; a linear gives [..., N], a norm [..., K].
Linear = Callable[[Float], Float]
Norm = Callable[[Float], Float]


@dataclass(frozen=True)
class IntegerLinear:
    """int8 values [N, K] with float32 scales: one, or one for each of as many blocks of rows as
    there are, up to one a row [N]; and the norm in front of the quantiser, which a BitLinear has.

    q, step = absmax int8 of norm(x), a token; acc = q @ values^T; out = acc * (scale * step).
    rounding: where the quantiser's ties go.
    """

    values_NK: NDArray[np.int8]
    scale: Float | np.float32
    norm: Norm | None = None
    rounding: str = "away"

    @cached_property
    def _scales(self) -> Float:
        """One, or a row's each."""
        scale = np.atleast_1d(np.asarray(self.scale, np.float32))
        return scale if len(scale) == 1 else np.repeat(scale, len(self.values_NK) // len(scale))

    def quantised_input(self, x: Float) -> tuple[NDArray[np.int8], Float]:
        """Return (q int8 [..., K], step float32 [..., 1]). Raises ValueError for values that are
        not finite."""
        return quantise_activation(x if self.norm is None else self.norm(x), self.rounding)

    def accumulators(self, q: NDArray[np.int8]) -> NDArray[np.int32]:
        """Return the exact sums acc[..., n] = sum_k q[..., k] * values[n, k]."""
        return exact_product(q, self.values_NK)

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., N] of float32 [..., K]."""
        q, step = self.quantised_input(x)
        return self.accumulators(q).astype(np.float32) * (self._scales * step)


@dataclass(frozen=True)
class GroupLinear:
    """int8 values [N, K] with a float32 scale for each row and group of inputs [N, groups]; the
    inputs are quantised group by group, ties to even.

    out = fma(acc[g], scale[g] * step[g], out) over rising groups g, from 0.
    """

    values_NK: NDArray[np.int8]
    scale_NG: Float
    norm: Norm | None = None

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., N] of float32 [..., K]."""
        count = self.scale_NG.shape[1]
        size = self.values_NK.shape[1] // count
        q, step = quantise_groups(x if self.norm is None else self.norm(x), size)
        out = np.zeros((*x.shape[:-1], len(self.values_NK)), np.float32)
        for g in range(count):
            columns = slice(g * size, (g + 1) * size)
            acc = exact_product(q[..., columns], self.values_NK[:, columns]).astype(np.float32)
            out = fma(acc, self.scale_NG[:, g] * step[..., g, None], out)
        return out


@dataclass(frozen=True)
class ExactLinear:
    """x @ W^T in float32, in the order of docs/numerics.md."""

    weight_NK: Float

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., N] of float32 [..., K]."""
        return float_product(x, self.weight_NK)


@dataclass(frozen=True)
class FloatLinear:
    """x @ W^T in float32, in the order of the BLAS."""

    weight_NK: Float

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., N] of float32 [..., K]."""
        product: Float = x @ self.weight_NK.T
        return product


def stored_linear(weight_NK: NDArray[Any], scale: Float | None, *, exact: bool = False) -> Linear:
    """The layer of a stored matrix: int8 with a scale a row or a group, or floats; exact: whether
    float sums have the order of docs/numerics.md, or that of the BLAS."""
    if scale is not None:
        kind = IntegerLinear if scale.ndim == 1 else GroupLinear
        return kind(weight_NK, scale)
    return ExactLinear(expanded(weight_NK)) if exact else FloatLinear(expanded(weight_NK))


def expanded(stored: NDArray[Any]) -> Float:
    """float32 of a stored float tensor (bfloat16 comes as uint16 bits)."""
    return from_bfloat16(stored) if stored.dtype == np.uint16 else stored
