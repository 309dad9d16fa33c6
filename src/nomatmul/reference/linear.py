"""Linear layers: int8 matrices (ternary ones among them) with exact sums, and float ones.

Legend: K inputs, N outputs; `...` any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.quantise import from_bfloat16, quantise_activation
from nomatmul.reference.activations import Float
from nomatmul.reference.ops import exact_product

# Both take float32 [..., K]; a linear gives [..., N], a norm [..., K].
Linear = Callable[[Float], Float]
Norm = Callable[[Float], Float]


@dataclass(frozen=True)
class IntegerLinear:
    """int8 values [N, K] with float32 scales: one, or one a row [N]; and the norm in front of the
    quantiser, which a ternary layer (a BitLinear) has.

    q, step = absmax int8 of norm(x); acc = q @ values^T; out = acc * (scale * step).
    """

    values_NK: NDArray[np.int8]
    scale: Float | np.float32
    norm: Norm | None = None

    def quantised_input(self, x: Float) -> tuple[NDArray[np.int8], Float]:
        """Return (q int8 [..., K], step float32 [..., 1]). Raises ValueError for values that are
        not finite."""
        return quantise_activation(x if self.norm is None else self.norm(x))

    def accumulators(self, q: NDArray[np.int8]) -> NDArray[np.int32]:
        """Return the exact sums acc[..., n] = sum_k q[..., k] * values[n, k]."""
        return exact_product(q, self.values_NK)

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., N] of float32 [..., K]."""
        q, step = self.quantised_input(x)
        return self.accumulators(q).astype(np.float32) * (self.scale * step)


@dataclass(frozen=True)
class FloatLinear:
    """x @ W^T in float32, in the order of the BLAS."""

    weight_NK: Float

    def __call__(self, x: Float) -> Float:
        """Return float32 [..., N] of float32 [..., K]."""
        product: Float = x @ self.weight_NK.T
        return product


def stored_linear(weight_NK: NDArray[Any], scale_N: Float | None) -> Linear:
    """The layer of a stored matrix: int8 with a scale a row, or floats."""
    if scale_N is None:
        return FloatLinear(expanded(weight_NK))
    return IntegerLinear(weight_NK, scale_N)


def expanded(stored: NDArray[Any]) -> Float:
    """float32 of a stored float tensor (bfloat16 comes as uint16 bits)."""
    return from_bfloat16(stored) if stored.dtype == np.uint16 else stored
