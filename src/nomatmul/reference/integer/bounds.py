"""Proof, from the weights alone, that nothing overflows; and the fractions that follow from it.

For any token and any state, the bounds below hold for what integer inference computes, all
roundings included; docs/hardware-numerics.md derives them. With p = x * w1 (K elements), v = x *
w12, r = |w12 / w1| element by element, t = sqrt(mean(p^2) + eps):

    |out[n]| = (scale / t) |sum_k t[n, k] (v_k + error_k)|
            <= scale * sqrt(K) * (|| t[n] * r || + nnz[n] * E * max r / 127) * (1 + S)

by Cauchy-Schwarz with ||p|| <= sqrt(K) * t, an error of E steps a / 127 of the quantiser and
a <= max r * ||p||. S is what cutting products to 17 bits and scalars to 18 takes from t. A state is
a convex combination of earlier ones and of silu(i), and rounding keeps it inside.

Legend: K inputs, N outputs, D hidden size, V rows of trees, T trees, L levels, A visited rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nomatmul.reference.integer.folds import (
    Branch,
    Fold,
    Forest,
    Fractions,
    Gated,
    Linear,
    Mixer,
    Network,
    Real,
)
from nomatmul.reference.integer.numerics import ACTIVATION_MAX, FRACTION_MOST, Formats, Int

# Steps of a quantised input that it may be off by: half, and 127 / 2^15 of a cut product, of a cut
# reciprocal 127 / 2^17.
_STEP_ERROR = 0.506
# What silu takes of a negative number: 0.2785 and the error of the table.
_SILU_LEAST = 0.28
# Scalars and the factor of `rescale`, cut to 18 bits, are no more than this too small or large.
_SCALAR_ERROR = 2.0**-16
# What `scaled` may cut off a product, of the largest one.
_CUT = 2.0**-15
# A fraction of fewer bits than this is no model any more.
_FRACTION_LEAST = 4
_INPUTS_MOST = 1 << 16
# Rows of a matrix that are looked at together.
_ROWS = 4096


@dataclass(frozen=True)
class Bounds:
    """The largest absolute values: {name of a linear's outputs, or "layers.0.mixer.u", ...}, for
    tests and for those who want to know how loose they are; `residual` [D] of the last layer."""

    largest: dict[str, float]
    residual: Real


def prove(network: Network, formats: Formats) -> tuple[Fractions, Bounds]:
    """The fractions under which nothing can overflow, as large as they may be.

    Raises ValueError, naming the layer, the bound, the limit and the width that would do.
    """
    return _Proof(formats).run(network)


class _Proof:
    def __init__(self, formats: Formats) -> None:
        self._formats, self._largest = formats, dict[str, float]()
        # what roundings to VF bits may add to a number
        self._unit = 2.0 ** (1 - formats.vector_fraction)

    def run(self, network: Network) -> tuple[Fractions, Bounds]:
        peak_D, terms = self._embedded(network), 1
        mixer, channel = [], []
        for layer in network.layers:
            mixer.append(self._mixer(layer.mixer))
            channel.append(self._formats.vector_fraction)
            if isinstance(layer.channel, Gated):
                channel[-1] = self._gated(layer.channel)
            elif layer.channel is not None:
                self._forest(layer.channel)
            for part in (layer.mixer, layer.channel):
                if part is not None:
                    peak_D, terms = peak_D + self._added(part), terms + 1
        residual = self._fraction("the residual", float(peak_D.max(initial=0.0)), terms)
        ((_, head_V),) = self._outputs(network.head)
        logits = self._fraction("logits", self._note("head", head_V), 1)
        fractions = Fractions(residual, tuple(mixer), tuple(channel), logits)
        return fractions, Bounds(self._largest, peak_D)

    def _embedded(self, network: Network) -> Real:
        """The largest embedding [D]."""
        peak_D = np.zeros(network.size)
        for row in range(0, len(network.embedding), _ROWS):
            rows = slice(row, row + _ROWS)
            values = np.abs(network.embedding[rows].astype(np.float64))
            values *= network.embedding_scale[rows, None]
            peak_D = np.maximum(peak_D, values.max(axis=0))
        self._note("embed", peak_D)
        return peak_D

    def _mixer(self, part: Mixer) -> int:
        """The fraction of u."""
        _, i_D, g_D = self._gates(part.enter)
        state_D = np.maximum(i_D, _SILU_LEAST)
        formats, peak = self._formats, self._note(f"{part.name}.h", state_D)
        self._fits(f"the state of {part.name}", peak, "state", formats.state_fraction)
        return self._product(f"{part.name}.u", g_D * (state_D + self._unit))

    def _gated(self, part: Gated) -> int:
        """The fraction of u."""
        gate_M, up_M = self._gates(part.enter)
        return self._product(f"{part.name}.u", np.maximum(gate_M, _SILU_LEAST) * up_M)

    def _forest(self, part: Forest) -> None:
        self._gates(part.enter)

    def _added(self, part: Mixer | Gated | Forest) -> Real:
        """What a part adds to the residual, [D]."""
        if isinstance(part, Forest):
            out_D = self._trees(part)
        else:
            ((_, out_D),) = self._outputs(part.leave)
        self._note(part.leave.name, out_D)
        return out_D

    def _trees(self, part: Forest) -> Real:
        """Of each level of each tree one node is visited, whichever; w12 is norm_out, w1 is 1."""
        ((branch, linear),) = part.leave.linears()
        visits = part.leave.inputs
        self._sums(linear, visits, visits)
        levels = [slice((1 << level) - 1, (2 << level) - 1) for level in range(part.depth + 1)]
        trees = np.split(np.abs(branch.weight.real()), part.trees)
        ratio_A = np.array([nodes[level].max() for nodes in trees for level in levels])
        norm = math.sqrt(float((ratio_A**2).sum()))
        used_D = np.abs(linear.values).max(axis=0, initial=0)
        bound = _output_bound(linear.scale, visits, norm, visits, ratio_A.max(initial=0.0))
        out_D: Real = used_D * bound
        return out_D

    def _gates(self, fold: Fold) -> list[Real]:
        """Bounds [N] of what is kept with VF fraction bits, roundings included."""
        bounds = []
        for linear, bound in self._outputs(fold):
            peak = self._note(linear.name, bound)
            name = f"the outputs of {linear.name}"
            self._fits(name, peak, "vector", self._formats.vector_fraction)
            bounds.append(bound + self._unit)
        return bounds

    def _outputs(self, fold: Fold) -> list[tuple[Linear, Real]]:
        """(linear, bound [N] of its outputs) of a fold, in its order."""
        for _, linear in fold.linears():
            counts = [int(np.count_nonzero(row)) for row in linear.values]
            self._sums(linear, fold.inputs, max(counts, default=0))
        return [(linear, output_bounds(fold, branch, linear)) for branch, linear in fold.linears()]

    def _sums(self, linear: Linear, inputs: int, count: int) -> None:
        """Raises ValueError for more inputs than a norm may have, and where an accumulator can
        overflow; count: weights of a row that are not 0."""
        if inputs > _INPUTS_MOST:
            raise ValueError(f"{linear.name} has {inputs} inputs, more than {_INPUTS_MOST}")
        self._fits(f"the sums of {linear.name}", ACTIVATION_MAX * count, "sum", 0)

    def _product(self, name: str, bound: Real) -> int:
        """The fraction of a product of two numbers of VF fraction bits."""
        fraction = self._fraction(name, self._note(name, bound), 1)
        return min(fraction, 2 * self._formats.vector_fraction - 1)

    def _fraction(self, name: str, peak: float, terms: int) -> int:
        """The largest that holds `peak` and the roundings of its terms."""
        bits = self._formats.vector_bits
        for fraction in range(FRACTION_MOST, _FRACTION_LEAST - 1, -1):
            if peak + terms * 2.0**-fraction <= _limit(bits, fraction):
                return fraction
        peak += terms * 2.0**-_FRACTION_LEAST
        self._fits(name, peak, "vector", _FRACTION_LEAST)
        raise AssertionError(name)

    def _fits(self, name: str, peak: float, kind: str, fraction: int) -> None:
        """Raises ValueError where a width (`kind`_bits) does not hold `peak`."""
        bits: int = getattr(self._formats, f"{kind}_bits")
        if peak > _limit(bits, fraction):
            raise ValueError(
                f"{name} may reach {peak:.6g}, and {kind}_bits {bits} with {fraction} fraction bits"
                f" hold {_limit(bits, fraction):.6g}; {kind}_bits={_bits(peak, fraction)} would do"
            )

    def _note(self, name: str, bound: Real) -> float:
        self._largest[name] = peak = float(np.max(bound, initial=0.0))
        return peak


def output_bounds(fold: Fold, branch: Branch, linear: Linear) -> Real:
    """|out| [N] of a linear of a fold, whatever its input."""
    root_K, weight_K = np.abs(fold.root.real()), np.abs(branch.weight.real())
    ratio_K = np.divide(weight_K, root_K, out=np.zeros_like(weight_K), where=root_K > 0)
    norm_N, count_N = np.zeros(len(linear.values)), np.zeros(len(linear.values), np.int64)
    for row in range(0, len(norm_N), _ROWS):
        rows = slice(row, row + _ROWS)
        used = linear.values[rows] != 0
        count_N[rows] = used.sum(axis=-1)
        norm_N[rows] = np.sqrt(used.astype(np.float64) @ ratio_K**2)
    largest = float(ratio_K.max(initial=0.0))
    return _output_bound(linear.scale, fold.inputs, norm_N, count_N, largest)


def _output_bound(
    scale: float, inputs: int, norm: Real | float, count: Int | int, ratio: float
) -> Real:
    """|out| of rows whose used ratios have the norm `norm` and the number `count`."""
    rounding = count * (_STEP_ERROR / ACTIVATION_MAX) * ratio
    slack = (1 + _SCALAR_ERROR) / (1 - math.sqrt(inputs) * _CUT)
    bound: Real = np.asarray(scale * math.sqrt(inputs) * (norm + rounding) * slack)
    return bound


def _limit(bits: int, fraction: int) -> float:
    """The largest value, less a unit for its rounding."""
    return float(((1 << (bits - 1)) - 2) / (1 << fraction))


def _bits(peak: float, fraction: int) -> int:
    """The least width that holds `peak`."""
    bits = 2
    while peak > _limit(bits, fraction):
        bits += 1
    return bits
