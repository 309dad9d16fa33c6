"""Norms folded into the linears behind them: what integer inference reads of a model.

A norm of weight w1 in front of a linear whose inner norm has the weight w2, whose quantiser takes
away the scale, computes on x, whatever the scale of x:

    a = max |x w1 w2|;   q = round(127 x w1 w2 / a);   t = sqrt(mean((x w1)^2) + eps ...)
    out[n] = (sum_k q[k] t[n, k]) * (a / t) * (scale / 127)

so a fold is w1 (`root`), and for every linear the product w1 * w2 (`Branch.weight`), both rounded
to integers with one exponent a vector.

Legend: K inputs, N outputs, V rows of trees, A visited rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.reference.integer.numerics import ACTIVATION_MAX, FRACTION_MOST, Int
from nomatmul.reference.integer.scalar import Scalar
from nomatmul.reference.integer.vector import ONES

Real = NDArray[np.float64]
_ONES_EXPONENT = 1 - ONES.bit_length()


@dataclass(frozen=True)
class Weight:
    """values int64 [K], which stand for values * 2^exponent; ones: all of them are ONES."""

    values: Int
    exponent: int
    ones: bool = False

    @classmethod
    def of(cls, values: NDArray[np.floating], bits: int) -> Weight:
        """Rounded so that the largest uses all bits; the range is symmetric."""
        wide = np.asarray(values, np.float64)
        most, largest = (1 << (bits - 1)) - 1, float(np.abs(wide).max(initial=0.0))
        if largest == 0:
            return cls(np.zeros(wide.shape, np.int64), 0)
        exponent = int(np.frexp(largest)[1]) - (bits - 1)
        if np.rint(np.ldexp(largest, -exponent)) > most:
            exponent += 1
        return cls(np.rint(np.ldexp(wide, -exponent)).astype(np.int64), exponent)

    @classmethod
    def of_ones(cls, size: int) -> Weight:
        """The weight of a norm without weights."""
        return cls(np.full(size, ONES, np.int64), _ONES_EXPONENT, True)

    def real(self) -> Real:
        """float64 [K], exact."""
        values: Real = np.ldexp(self.values.astype(np.float64), self.exponent)
        return values


@dataclass(frozen=True)
class Linear:
    """values int8 [N, K] of -1, 0, 1 and their scale; of trees the rows that are visited."""

    name: str
    values: NDArray[np.int8]
    scale: float


@dataclass(frozen=True)
class Branch:
    """One quantised input and the linears that take it. weight: w1 * w2 [K], of norm_out of trees
    [V], of which the visited rows are gathered."""

    name: str
    weight: Weight
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Fold:
    """root: w1. inputs: K, or A of trees. eps: added to the mean square.

    gate_eps, of o_proj: its vector is g * silu(h) and the norm that was folded away is that of g,
    so the mean square has gate_eps * mean(g^2) added, and eps is the product of both.
    """

    name: str
    root: Weight
    inputs: int
    branches: tuple[Branch, ...]
    eps: float = 0.0
    gate_eps: float = 0.0

    def linears(self) -> list[tuple[Branch, Linear]]:
        """In the order in which they are computed."""
        return [(branch, linear) for branch in self.branches for linear in branch.linears]

    def constants(self, fraction: int, gate_fraction: int = 0) -> Constants:
        """What scalar instructions take, for a vector of `fraction` bits (and g of its own)."""
        return Constants(
            mean=Scalar.of(2.0 ** (2 * (self.root.exponent - fraction)) / self.inputs),
            eps=Scalar.of(self.eps),
            gate=Scalar.of(
                self.gate_eps * 2.0 ** (2 * (_ONES_EXPONENT - gate_fraction)) / self.inputs
            ),
            factors={
                linear.name: Scalar.of(
                    linear.scale / ACTIVATION_MAX * 2.0 ** (branch.weight.exponent - fraction)
                )
                for branch in self.branches
                for linear in branch.linears
            },
        )


@dataclass(frozen=True)
class Constants:
    """Of a fold: mean square = sumsq * mean [+ sumsq(g) * gate] [+ eps], where they are not 0;
    M = a * factors[linear] / root."""

    mean: Scalar
    eps: Scalar
    gate: Scalar
    factors: dict[str, Scalar]


@dataclass(frozen=True)
class Mixer:
    """MLGRU: `enter` has the branches f_proj, i_proj, g_proj; `leave` o_proj. lower_bound int64
    [D], 16 fraction bits, or None."""

    name: str
    enter: Fold
    leave: Fold
    lower_bound: Int | None


@dataclass(frozen=True)
class Gated:
    """GLU: `enter` has one branch, of the linears gate_proj and up_proj; `leave` down_proj."""

    name: str
    enter: Fold
    leave: Fold


@dataclass(frozen=True)
class Forest:
    """Ternary trees: `enter` has the linear w_in [V, D], `leave` w_out [V, D]."""

    name: str
    enter: Fold
    leave: Fold
    trees: int
    depth: int


@dataclass(frozen=True)
class Layer:
    """A token mixer and, where there is one, a channel mixer."""

    mixer: Mixer
    channel: Gated | Forest | None


@dataclass(frozen=True)
class Network:
    """A model without the constants that depend on fractions: embedding int8 [V, D] with a scale
    [V] a row; head: the final norm and the head."""

    embedding: NDArray[np.int8]
    embedding_scale: NDArray[np.float32]
    layers: tuple[Layer, ...]
    head: Fold

    @property
    def size(self) -> int:
        """The hidden size."""
        size: int = self.embedding.shape[1]
        return size


@dataclass(frozen=True)
class Fractions:
    """Fraction bits that depend on a model: of the residual, of u = g * silu(h) and u = silu(gate)
    * up of each layer (of trees: of h), of the logits."""

    residual: int
    mixer: tuple[int, ...] = ()
    channel: tuple[int, ...] = ()
    logits: int = FRACTION_MOST

    def checked(self, proved: Fractions) -> Fractions:
        """Itself. Raises ValueError where one is larger than what a proof leaves, or below 0."""
        for name, values in vars(self).items():
            own, most = np.atleast_1d(values), np.atleast_1d(getattr(proved, name))
            if own.shape != most.shape or (own > most).any() or (own < 0).any():
                raise ValueError(
                    f"the fraction {name} is {values}, the bounds leave {most.tolist()}"
                )
        return self
