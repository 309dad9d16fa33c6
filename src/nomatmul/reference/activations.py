"""The activations, operation by operation as the native core has them: one table for all models.

The constants and their order are those of csrc/kernels/common/float_vectors.h, so results are equal
to the core's bit for bit; numpy's own exp differs in the last bits. Tests compare with float64.

Every function takes float32 of any shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

_F = np.float32
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1)
_LITTLE = (4.1666667e-2, 1.6666667e-1, 0.5, 1.0, 1.0)
_TAIL = (
    *(5.4151025e-5, 1.16037626e-4, -3.39911433e-4, -9.84184009e-4, 2.90470263e-3),
    *(6.13218314e-3, -4.62133138e-2, 1.23225022e-1, -2.06402618e-1, 1.21513948e-1),
)


def _polynomial(coefficients: tuple[float, ...], x: Float) -> Float:
    """Horner's scheme, highest power first."""
    p: Float = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        p = p * x + _F(coefficient)
    return p


def exp_poly(x: Float) -> Float:
    """Return exp(x) for x in [-88, 88], relative error below 2e-7 (Cephes' coefficients)."""
    shifter = _F(12582912.0)
    biased = x * _F(1.44269504088896341) + shifter
    n = biased - shifter
    r = (x - n * _F(0.693359375)) - n * _F(-2.12194440e-4)
    p = _polynomial((*_EXP, 5.0000001201e-1), r)
    p = (p * (r * r) + r) + _F(1.0)
    exponent = (biased.view(np.uint32) - shifter.view(np.uint32) + np.uint32(127)) << np.uint32(23)
    result: Float = p * exponent.view(np.float32)
    return result


def sigmoid(x: Float) -> Float:
    """Return 1 / (1 + exp(-x)); exactly 0 below -88."""
    y = np.clip(x, _F(-88.0), _F(88.0))
    s = _F(1.0) / (_F(1.0) + exp_poly(-y))
    return np.where(x < _F(-88.0), _F(0.0), s)


def silu(x: Float) -> Float:
    """Return x * sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Float) -> Float:
    """Return x * Phi(x) with the error function, no tanh; 0 below -12.9."""
    size = np.abs(x)
    a: Float = np.minimum(size, _F(12.9))
    high: Float = (a.view(np.int32) & np.int32(~0xFFF)).view(np.float32)
    below: Float = a - high
    above: Float = a + high
    rest: Float = below * above
    bell = exp_poly(high * high * _F(-0.5)) * _polynomial(_LITTLE, rest * _F(-0.5))
    u: Float = (a - _F(3.0)) / (a + _F(3.0))
    tail = bell * _polynomial(_TAIL, u)
    tail = np.where(size > _F(12.9), _F(0.0), tail)
    return x * np.where(x > 0, _F(1.0) - tail, tail)


def relu(x: Float) -> Float:
    """Return x where it is above 0, else 0."""
    return np.where(x > 0, x, _F(0.0))


def relu2(x: Float) -> Float:
    """Return the square of relu(x)."""
    r = relu(x)
    return r * r


ACTIVATIONS: dict[str, Callable[[Float], Float]] = {
    "gelu": gelu,
    "silu": silu,
    "relu": relu,
    "relu2": relu2,
    "tanh": np.tanh,  # of poolers only
}
