"""Where a model gets its weights: from a float checkpoint, quantised here, or as packed.

Legend: V vocabulary or rows of trees, D hidden size, L layers, N/K outputs and inputs of a linear.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats import architecture as parts
from nomatmul.formats.checks import check_dial
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.gates import cumulative_lower_bounds
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.packed.forms import is_table
from nomatmul.formats.quantise import quantise_weight
from nomatmul.reference import ops
from nomatmul.reference.activations import Float
from nomatmul.reference.linear import (
    FloatLinear,
    GroupLinear,
    IntegerLinear,
    Linear,
    Norm,
    stored_linear,
)
from nomatmul.reference.trees import FloatTrees, Int8Trees, TernaryTrees, Trees


class Weights(ABC):
    """The tensors of a model by the names of its parts ("layers.0.mixer.i_proj").

    exact: whether float sums of decoders have the order of docs/numerics.md, and states keep keys
    and values as `kv` says, "f16", "int8" or "f32". Where not, sums are those of the BLAS and
    states keep float32, as in other people's float32 code.
    """

    exact = False
    kv = "f16"

    @abstractmethod
    def vector(self, name: str) -> Float:
        """A norm's weight, a bias or another small tensor."""

    @abstractmethod
    def embedding(self) -> Float:
        """The table [V, D], expanded to its values."""

    @abstractmethod
    def linear(self, name: str, part: parts.Linear) -> Linear:
        """A linear layer."""

    @abstractmethod
    def trees(self, name: str, part: parts.FFF) -> Trees:
        """The trees of a channel mixer."""

    @abstractmethod
    def lower_bound(self, layer: int) -> Float:
        """The bound [D] of a layer's forget gate; exactly zero, that is none, in the first."""

    def linears(self, part: parts.Part, at: str) -> list[Linear]:
        """All linears of a part whose name is `at`, in the order of its fields."""
        return [self.linear(f"{at}.{name}", linear) for name, linear in parts.linears_of(part)]

    def inner_norm(self, name: str, part: parts.Linear) -> Norm | None:
        """The norm in front of a linear's quantiser, if there is one."""
        if part.norm_eps is None:
            return None
        return self.norm(f"{name}.norm", parts.Norm("rms", part.inputs, part.norm_eps))

    def norm(self, name: str, part: parts.Norm) -> Norm:
        """A norm over the last axis."""
        weight = self.vector(f"{name}.weight")
        if part.kind == "rms":
            return functools.partial(ops.rms_norm, weight=weight, eps=part.eps)
        bias = self.vector(f"{name}.bias")
        return functools.partial(ops.layer_norm, weight=weight, bias=bias, eps=part.eps)


def _no_quantised(name: str) -> None:
    """Of checkpoints that hold floats only."""


class FloatWeights(Weights):
    """`read` gives a float32 tensor of a training checkpoint by its name (docs/formats.md),
    `quantised` the whole numbers and scales of a matrix that came with them, None for others.

    What the table calls ternary is quantised here where it did not come so. A model of scale
    groups computes in float with the values as they are, and no activation is quantised.
    """

    def __init__(
        self,
        read: Callable[[str], Float],
        quantised: Callable[[str], Quantised | None] = _no_quantised,
    ) -> None:
        self._read, self._quantised = read, quantised

    def vector(self, name: str) -> Float:
        return self._read(name)

    def embedding(self) -> Float:
        return self.vector("embedding.weight")

    def linear(self, name: str, part: parts.Linear) -> Linear:
        source = "embedding.weight" if part.tied else f"{name}.weight"
        if part.kind == "dense":
            return FloatLinear(self.vector(source))
        norm = self.inner_norm(name, part)
        if part.scale_group:
            return _normed(norm, FloatLinear(self.vector(source)))
        stored = self._quantised(source)
        if stored is None:
            return IntegerLinear(*_ternary(self.vector(source), part), norm, part.rounding)
        assert stored.group == 0
        return IntegerLinear(stored.read(slice(None)), stored.scale, norm, part.rounding)

    def trees(self, name: str, part: parts.FFF) -> Trees:
        w_in_VD, w_out_VD = (self.vector(f"{name}.w_{way}") for way in ("in", "out"))
        if part.linear == "dense":
            bias_V = self.vector(f"{name}.bias") if part.bias else None
            return FloatTrees(part.trees, part.depth, part.activation, w_in_VD, w_out_VD, bias_V)
        (t_in_VD, scale_in), (t_out_VD, scale_out) = map(quantise_weight, (w_in_VD, w_out_VD))
        scales = np.array([scale_in, scale_out], np.float32)
        return _ternary_trees(self, name, part, t_in_VD, t_out_VD, scales)

    def lower_bound(self, layer: int) -> Float:
        row_D: Float = cumulative_lower_bounds(self.vector("lower_bounds"))[layer]
        return row_D


class PackedWeights(Weights):
    """A packed directory: values and scales as it stores them, quantised by nobody again.

    kv: how a decoder's states keep keys and values. Raises FormatError for damaged tensors.
    """

    def __init__(self, reader: PackedReader, kv: str = "f16") -> None:
        check_dial("kv", kv, ("f16", "int8", "f32"))
        self._reader, self.kv, self.exact = reader, kv, reader.config.causal
        self._tied = is_table(parts.architecture_of(reader.config), reader.forms)

    def vector(self, name: str) -> Float:
        return self._reader.read_float32(name)

    def embedding(self) -> Float:
        return self._reader.embedding()

    def linear(self, name: str, part: parts.Linear) -> Linear:
        tied = part.tied and self._tied
        values, scale = self._reader.matrix("embedding" if tied else name)
        if part.kind == "dense":
            return stored_linear(values, scale, exact=self.exact)
        assert scale is not None
        norm, values = self.inner_norm(name, part), values.astype(np.int8, copy=False)
        if part.scale_group:
            return GroupLinear(values, scale, norm)
        return IntegerLinear(values, scale, norm, part.rounding)

    def trees(self, name: str, part: parts.FFF) -> Trees:
        rows_V2D, scales = self._reader.rows(name)
        w_in_VD, w_out_VD = np.ascontiguousarray(rows_V2D.swapaxes(0, 1))
        if part.linear == "ternary":
            assert scales is not None
            return _ternary_trees(self, name, part, w_in_VD, w_out_VD, scales)
        sizes = (part.trees, part.depth, part.activation)
        bias_V = self.vector(f"{name}.bias") if part.bias else None
        if scales is not None:
            return Int8Trees(*sizes, w_in_VD, w_out_VD, scales, bias_V)
        return FloatTrees(*sizes, w_in_VD, w_out_VD, bias_V)

    def lower_bound(self, layer: int) -> Float:
        return self.vector(f"layers.{layer}.mixer.lower_bound")


def _ternary_trees(
    weights: Weights,
    name: str,
    part: parts.FFF,
    t_in_VD: NDArray[np.int8],
    t_out_VD: NDArray[np.int8],
    scales: Float,
) -> TernaryTrees:
    norm_in_D, norm_out_V = (weights.vector(f"{name}.norm_{way}.weight") for way in ("in", "out"))
    sizes = (part.trees, part.depth, part.activation)
    return TernaryTrees(*sizes, t_in_VD, t_out_VD, scales, norm_in_D, norm_out_V, part.norm_eps)


def _ternary(weight_NK: Float, part: parts.Linear) -> tuple[NDArray[np.int8], Float]:
    """The absmean quantiser, block of rows by block: (values [N, K], scale [blocks])."""
    blocks = np.split(weight_NK, part.scale_shape[0])
    values, scales = zip(*map(quantise_weight, blocks), strict=True)
    return np.concatenate(values), np.array(scales, np.float32)


def _normed(norm: Norm | None, linear: Linear) -> Linear:
    return linear if norm is None else lambda x: linear(norm(x))
