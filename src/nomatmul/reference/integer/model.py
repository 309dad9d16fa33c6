"""The forward pass of a MatMul-free LM in integers: what the accelerator computes, bit for bit.

Legend: B sequences, T tokens, N tokens of all sequences, D hidden size, M intermediate size, A
visited rows of trees, V vocabulary; `...` any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.packed import PackedReader
from nomatmul.reference import trees
from nomatmul.reference.integer import bounds, gates
from nomatmul.reference.integer.folds import (
    Constants,
    Fold,
    Forest,
    Gated,
    Mixer,
    Network,
)
from nomatmul.reference.integer.numerics import ACTIVATION_MAX, Formats, Int
from nomatmul.reference.integer.reading import network_of
from nomatmul.reference.integer.scalar import Scalar, add, div, mul, sqrt
from nomatmul.reference.integer.table import silu
from nomatmul.reference.integer.trace import Trace
from nomatmul.reference.integer.vector import ONES, quantise, rescale, scan, sumsq
from nomatmul.reference.ops import exact_product

ONE = Scalar.of(1.0)
LARGEST = Scalar.of(float(ACTIVATION_MAX))

# A layer's state: h int64 [B, D]. Arrays are replaced, never changed.
State = list[Int]


@dataclass(frozen=True)
class Read:
    """What the linears of a fold take: {branch: quantised int64 [..., K]}, {linear: factor}."""

    quantised: dict[str, Int]
    factors: dict[str, Scalar]


class IntegerModel:
    """A packed MatMul-free LM (MLGRU with GLU or ternary trees) in fixed point.

    formats: widths. network: its folds. fractions, bounds: what `bounds.prove` found. constants:
    {name of a fold: Constants}. embedding_scale: a Scalar [V] of the rows of network.embedding.
    """

    def __init__(self, config: ModelConfig, network: Network, formats: Formats) -> None:
        self.config, self.network, self.formats = config, network, formats
        self.fractions, self.bounds = bounds.prove(network, formats)
        self.embedding_scale = Scalar.of(network.embedding_scale)
        self.constants: dict[str, Constants] = {}
        fractions, kept = self.fractions, formats.vector_fraction
        for number, layer in enumerate(network.layers):
            self._prepare(layer.mixer.enter, fractions.residual)
            self._prepare(layer.mixer.leave, fractions.mixer[number], kept)
            if layer.channel is not None:
                self._prepare(layer.channel.enter, fractions.residual)
                self._prepare(layer.channel.leave, fractions.channel[number])
        self._prepare(network.head, fractions.residual)

    def _prepare(self, fold: Fold, fraction: int, gate_fraction: int = 0) -> None:
        self.constants[fold.name] = fold.constants(fraction, gate_fraction)

    @classmethod
    def from_packed(cls, reader: PackedReader, formats: Formats | None = None) -> IntegerModel:
        """Build from a packed directory; an embedding of floats is rounded to int8 rows.

        Raises ValueError for a part that the accelerator lacks, and for widths in which something
        could overflow (it names the layer and the width that would do).
        """
        formats = formats or Formats()
        return cls(reader.config, network_of(reader, formats), formats)

    @property
    def logits_scale(self) -> float:
        """The value of a unit of the logits."""
        return 2.0**-self.fractions.logits

    def new_state(self, batch: int = 1) -> State:
        """The empty memory of `batch` sequences."""
        sizes = [layer.mixer.leave.inputs for layer in self.network.layers]
        return [np.zeros((batch, size), np.int64) for size in sizes]

    def step(self, token: int, state: State, trace: Trace | None = None) -> NDArray[np.int32]:
        """The logits int32 [V] behind one more token of one sequence; `state` is brought up to date
        in place, and `trace` is told what every step left. Raises ValueError for a token outside
        the vocabulary."""
        logits_BTV, new = self.forward([[token]], state, trace)
        state[:] = new
        logits_V: NDArray[np.int32] = logits_BTV[0, 0]
        return logits_V

    def forward(
        self, input_ids: ArrayLike, state: State | None = None, trace: Trace | None = None
    ) -> tuple[NDArray[np.int32], State]:
        """(logits int32 [B, T, V], new state) of ids [B, T] behind a state; trace: of one token.

        Raises ValueError for an id outside the vocabulary or an input that is not [B, T].
        """
        ids_BT = self._checked(input_ids)
        state = self.new_state(len(ids_BT)) if state is None else state
        assert all(len(h_BD) == len(ids_BT) for h_BD in state)
        run = _Run(self, trace)
        x_BTD = run.embedded(ids_BT)
        new = []
        for number, layer in enumerate(self.network.layers):
            x_BTD, h_BD = run.mixed(x_BTD, state[number], layer.mixer, number)
            new.append(h_BD)
            if isinstance(layer.channel, Gated):
                x_BTD = run.gated(x_BTD, layer.channel, number)
            elif layer.channel is not None:
                x_BTD = run.forest(x_BTD, layer.channel)
        return run.logits(x_BTD).astype(np.int32), new

    def logprobs(self, logits: NDArray[np.int32]) -> NDArray[np.float64]:
        """float64 [..., V]: natural logarithms of the probabilities that logits stand for."""
        real = logits * self.logits_scale
        real -= real.max(axis=-1, keepdims=True)
        result: NDArray[np.float64] = real - np.log(np.exp(real).sum(axis=-1, keepdims=True))
        return result

    def score(self, input_ids: ArrayLike, chunk: int = 64) -> NDArray[np.float64]:
        """float64 [B, T - 1]: log p(ids[t] | ids[:t]) of ids [B, T], `chunk` tokens at once."""
        ids_BT = self._checked(input_ids)
        state, found = self.new_state(len(ids_BT)), []
        for first in range(0, ids_BT.shape[1] - 1, chunk):
            part_BT = ids_BT[:, first : first + chunk + 1]
            logits_BTV, state = self.forward(part_BT[:, :-1], state)
            next_BT1 = part_BT[:, 1:, None]
            found.append(np.take_along_axis(self.logprobs(logits_BTV), next_BT1, -1)[..., 0])
        return np.concatenate(found, axis=1) if found else np.zeros((len(ids_BT), 0))

    def _checked(self, input_ids: ArrayLike) -> Int:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be integers [B, T], got {ids.dtype} {ids.shape}")
        low, high, size = int(ids.min()), int(ids.max()), len(self.network.embedding)
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is out of range; the vocabulary is 0..{size - 1}")
        return ids.astype(np.int64)


class _Run:
    """One pass: the steps, and what is traced of them."""

    def __init__(self, model: IntegerModel, trace: Trace | None) -> None:
        self._model, self._trace, self._formats = model, trace, model.formats

    def embedded(self, ids_BT: Int) -> Int:
        network, scale = self._model.network, self._model.embedding_scale
        values = network.embedding[ids_BT].astype(np.int64)
        factor = Scalar(scale.m[ids_BT], scale.e[ids_BT])
        return self._left("embed", self._rescaled(values, factor, self._model.fractions.residual))

    def mixed(self, x_BTD: Int, h_BD: Int, part: Mixer, layer: int) -> tuple[Int, Int]:
        """(x + MLGRU, new state)."""
        formats, name = self._formats, part.name
        f_BTD, i_BTD, g_BTD = self._outputs(part.enter, x_BTD, formats.vector_fraction)
        gate_BTD = gates.forget_gate(f_BTD, part.lower_bound, formats)
        h_BTD = np.empty_like(gate_BTD)
        for t in range(h_BTD.shape[1]):
            h_BD = gates.next_state(gate_BTD[:, t], i_BTD[:, t], h_BD, formats)
            h_BTD[:, t] = h_BD
        shift = 2 * formats.vector_fraction - self._model.fractions.mixer[layer]
        u_BTD = gates.gated_state(g_BTD, h_BTD, shift, formats)
        for key, value in (("h", h_BTD), ("g", g_BTD), ("u", u_BTD)):
            self._left(f"{name}.{key}", value)
        return self._added(x_BTD, name, self._summed(part.leave, u_BTD, g_BTD)), h_BD

    def gated(self, x_BTD: Int, part: Gated, layer: int) -> Int:
        """x + GLU."""
        formats = self._formats
        gate_BTM, up_BTM = self._outputs(part.enter, x_BTD, formats.vector_fraction)
        shift = 2 * formats.vector_fraction - self._model.fractions.channel[layer]
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
        z = self._rescaled(acc, read.factors[linear.name], self._formats.vector_fraction)
        h = self._left(f"{part.name}.h", silu(z, self._formats))
        return self._added(x_BTD, part.name, self._combined(part, h, rows))

    def logits(self, x_BTD: Int) -> Int:
        (logits,) = self._outputs(self._model.network.head, x_BTD, self._model.fractions.logits)
        self._left("logits", logits)
        if self._trace is not None:
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
        return self._rescaled(acc, read.factors[linear.name], self._model.fractions.residual)

    def _summed(self, fold: Fold, u: Int, gate: Int | None = None) -> Int:
        """The output of a fold with one linear, as the residual has it."""
        (out,) = self._outputs(fold, u, self._model.fractions.residual, gate)
        return out

    def _outputs(self, fold: Fold, x: Int, fraction: int, gate: Int | None = None) -> list[Int]:
        """Of every linear of a fold, in its order."""
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
                constant = self._model.constants[fold.name].factors[linear.name]
                step = self._scalar(f"{linear.name}.scaled", mul(a, constant))
                factor = self._scalar(f"{linear.name}.factor", mul(step, inverse))
                read.factors[linear.name] = factor
        return read

    def _inverse_root(self, fold: Fold, x: Int, gate: Int | None) -> Scalar:
        """1 / t."""
        at, constants, root = fold.name, self._model.constants[fold.name], fold.root.values
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
        return rescale(acc, factor, fraction, self._formats.vector_bits)

    def _added(self, x: Int, name: str, y: Int) -> Int:
        return self._left(f"{name}.residual", gates.residual(x, y, self._formats))

    def _scalar(self, name: str, value: Scalar) -> Scalar:
        if self._trace is not None:
            self._trace.record(name, value)
        return value

    def _left(self, name: str, value: Int) -> Int:
        if self._trace is not None:
            self._trace.record(name, value)
        return value
