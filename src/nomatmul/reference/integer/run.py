"""The steps of integer inference, part by part: what every instruction of a pass computes.

Legend: B sequences, T tokens, N tokens of all sequences, D hidden size, M intermediate size, K/N
inputs and outputs of a linear, L levels and A visited rows of trees, V vocabulary; `...` any
leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.reference import trees
from nomatmul.reference.integer import gates
from nomatmul.reference.integer.folds import Constants, Fold, Forest, Fractions, Gated, Mixer
from nomatmul.reference.integer.numerics import ACTIVATION_MAX, Formats, Int
from nomatmul.reference.integer.scalar import Scalar, add, div, mul, sqrt
from nomatmul.reference.integer.table import silu
from nomatmul.reference.integer.trace import Trace
from nomatmul.reference.integer.vector import ONES, quantise, rescale, scan, sumsq
from nomatmul.reference.ops import exact_product

ONE = Scalar.of(1.0)
LARGEST = Scalar.of(float(ACTIVATION_MAX))


@dataclass(frozen=True)
class Read:
    """What the linears of a fold take: {branch: quantised int64 [..., K]}, {linear: factor}."""

    quantised: dict[str, Int]
    factors: dict[str, Scalar]


@dataclass(frozen=True)
class Run:
    """One pass. constants: {name of a fold: its constants}; trace: told what every step left, where
    there is one."""

    constants: dict[str, Constants]
    fractions: Fractions
    formats: Formats
    trace: Trace | None = None

    def embedded(self, values_BTD: NDArray[np.int8], scale_BT: Scalar) -> Int:
        """The residual behind rows of the embedding."""
        values = values_BTD.astype(np.int64)
        return self._left("embed", self._rescaled(values, scale_BT, self.fractions.residual))

    def mixed(self, x_BTD: Int, h_BD: Int, part: Mixer, layer: int) -> tuple[Int, Int]:
        """(x + MLGRU, new state)."""
        formats, name = self.formats, part.name
        f_BTD, i_BTD, g_BTD = self.outputs(part.enter, x_BTD, formats.vector_fraction)
        gate_BTD = gates.forget_gate(f_BTD, part.lower_bound, formats)
        h_BTD = np.empty_like(gate_BTD)
        for t in range(h_BTD.shape[1]):
            h_BD = gates.next_state(gate_BTD[:, t], i_BTD[:, t], h_BD, formats)
            h_BTD[:, t] = h_BD
        shift = 2 * formats.vector_fraction - self.fractions.mixer[layer]
        u_BTD = gates.gated_state(g_BTD, h_BTD, shift, formats)
        for key, value in (("h", h_BTD), ("g", g_BTD), ("u", u_BTD)):
            self._left(f"{name}.{key}", value)
        return self._added(x_BTD, name, self._summed(part.leave, u_BTD, g_BTD)), h_BD

    def gated(self, x_BTD: Int, part: Gated, layer: int) -> Int:
        """x + GLU."""
        formats = self.formats
        gate_BTM, up_BTM = self.outputs(part.enter, x_BTD, formats.vector_fraction)
        shift = 2 * formats.vector_fraction - self.fractions.channel[layer]
        u_BTM = self._left(f"{part.name}.u", gates.glu(gate_BTM, up_BTM, shift, formats))
        return self._added(x_BTD, part.name, self._summed(part.leave, u_BTM))

    def forest(self, x_BTD: Int, part: Forest) -> Int:
        """x + trees: they walk on exact sums, and their visited rows are combined."""
        read = self._read(part.enter, x_BTD)
        ((branch, linear),) = part.enter.linears()
        q_ND = read.quantised[branch.name].reshape(-1, x_BTD.shape[-1]).astype(np.int8)
        acc_NTL, rows_NTL = trees.walk(
            lambda rows_NT: trees.gather_exact(q_ND, rows_NT, linear.values),
            *(len(q_ND), part.trees, part.depth),
        )
        shape = (*x_BTD.shape[:-1], -1)
        rows = rows_NTL.reshape(shape)
        self._left(f"{linear.name}.rows", rows.astype(np.int64))
        acc = self._left(f"{linear.name}.sums", acc_NTL.reshape(shape).astype(np.int64))
        z = self._rescaled(acc, read.factors[linear.name], self.formats.vector_fraction)
        h = self._left(f"{part.name}.h", silu(z, self.formats))
        return self._added(x_BTD, part.name, self._combined(part, h, rows))

    def logits(self, x: Int, head: Fold) -> Int:
        """[..., V]."""
        (logits,) = self.outputs(head, x, self.fractions.logits)
        self._left("logits", logits)
        if self.trace is not None:
            self._left("argmax", np.argmax(logits, axis=-1))
        return logits

    def _combined(self, part: Forest, h: Int, rows: trees.Rows) -> Int:
        """The sums over the visited rows, as the residual has them."""
        ((branch, linear),) = part.leave.linears()
        weight = self._left(f"{part.name}.norm_out", branch.weight.values[rows])
        read = self._read(part.leave, h, weight=weight)
        q_NA = read.quantised[branch.name].reshape(-1, h.shape[-1])
        acc_ND = trees.combine(q_NA, rows.reshape(q_NA.shape), linear.values)
        acc = self._left(f"{linear.name}.sums", acc_ND.reshape(*h.shape[:-1], -1))
        return self._rescaled(acc, read.factors[linear.name], self.fractions.residual)

    def _summed(self, fold: Fold, u: Int, gate: Int | None = None) -> Int:
        """The output of a fold with one linear, as the residual has it."""
        (out,) = self.outputs(fold, u, self.fractions.residual, gate)
        return out

    def outputs(self, fold: Fold, x: Int, fraction: int, gate: Int | None = None) -> list[Int]:
        """int64 [..., N] of `fraction` bits of every linear of a fold, in its order. gate: g of
        MLGRU, where x is g * silu(h)."""
        read, sums = self._read(fold, x, gate), []
        for branch, linear in fold.linears():
            q = read.quantised[branch.name].astype(np.int8)
            acc = exact_product(q, linear.values).astype(np.int64)
            sums.append((self._left(f"{linear.name}.sums", acc), read.factors[linear.name]))
        return [self._rescaled(acc, factor, fraction) for acc, factor in sums]

    def _read(self, fold: Fold, x: Int, gate: Int | None = None, weight: Int | None = None) -> Read:
        """gate: g of MLGRU where u = g * silu(h) is read; weight: of trees, that of the rows."""
        inverse = self._inverse_root(fold, x, gate)
        read = Read({}, {})
        for branch in fold.branches:
            name, w12 = branch.name, branch.weight.values if weight is None else weight
            a = self._scalar(f"{name}.scan", scan(x, w12))
            r = self._scalar(f"{name}.inverse", div(LARGEST, a))
            read.quantised[name] = self._left(f"{name}.quantised", quantise(x, w12, a, r))
            for linear in branch.linears:
                constant = self.constants[fold.name].factors[linear.name]
                step = self._scalar(f"{linear.name}.scaled", mul(a, constant))
                factor = self._scalar(f"{linear.name}.factor", mul(step, inverse))
                read.factors[linear.name] = factor
        return read

    def _inverse_root(self, fold: Fold, x: Int, gate: Int | None) -> Scalar:
        """1 / t."""
        at, constants, root = fold.name, self.constants[fold.name], fold.root.values
        square = self._square(f"{at}.root", x, root)
        if gate is not None:
            gate_square = self._square(f"{at}.gate", gate, np.full(gate.shape[-1], ONES, np.int64))
        mean = self._scalar(f"{at}.root.mean", mul(square, constants.mean))
        if gate is not None:
            gate_mean = self._scalar(f"{at}.gate.mean", mul(gate_square, constants.gate))
            mean = self._scalar(f"{at}.root.sum", add(mean, gate_mean))
        if fold.eps:
            mean = self._scalar(f"{at}.root.eps", add(mean, constants.eps))
        t = self._scalar(f"{at}.root", sqrt(mean))
        return self._scalar(f"{at}.root.inverse", div(ONE, t))

    def _square(self, name: str, x: Int, w: Int) -> Scalar:
        a = self._scalar(f"{name}.scan", scan(x, w))
        return self._scalar(f"{name}.square", sumsq(x, w, a))

    def _rescaled(self, acc: Int, factor: Scalar, fraction: int) -> Int:
        return rescale(acc, factor, fraction, self.formats.vector_bits)

    def _added(self, x: Int, name: str, y: Int) -> Int:
        return self._left(f"{name}.residual", gates.residual(x, y, self.formats))

    def _scalar(self, name: str, value: Scalar) -> Scalar:
        if self.trace is not None:
            self.trace.record(name, value)
        return value

    def _left(self, name: str, value: Int) -> Int:
        if self.trace is not None:
            self.trace.record(name, value)
        return value
