"""A model that is to be exported, seen through published names: matrices as they are computed.

Anything that `pack` takes, and packed directories: ternary matrices come as values and scales, by
the model's own quantiser where they are latent floats. Legend: N/K rows and columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from nomatmul.convert.matrices import Floats, one_scale
from nomatmul.formats.architecture import architecture_of
from nomatmul.formats.checkpoint import Checkpoint, open_checkpoint
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.packed import PackedReader
from nomatmul.formats.packed.layout import Matrix
from nomatmul.formats.published.llama_write import PublishedTensor, family_of, published_tensors

_BLOCK_ELEMENTS = 1 << 20


class ExportSource:
    """The tensors of a decoder of Llama's shape by published names.

    Raises ValueError, naming the part, for a model that has no such form.
    """

    def __init__(self, source: Path) -> None:
        self.path = source
        self.checkpoint: Checkpoint = open_checkpoint(source)
        self.config = self.checkpoint.config
        if self.checkpoint.reading is not None:
            raise ValueError(f"{source} is an encoder, which has no form as a Llama or Qwen3")
        try:
            self.family = family_of(self.config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        self.tensors = {tensor.name: tensor for tensor in published_tensors(self.config)}
        model = architecture_of(self.config)
        self._ternary = {
            f"{name}.weight" for name, linear in model.linears().items() if linear.kind == "ternary"
        }
        if model.embedding.kind == "ternary":
            self._ternary.add("embedding.weight")
        self._last: tuple[str, Quantised] | None = None  # gate and up are parts of one

    @property
    def int8_activations(self) -> bool:
        """Whether the model's linears quantise their inputs a token, which floats do not do."""
        return self.config.linear == "ternary" and not self.config.scale_group

    @property
    def parameters(self) -> int:
        """Weights of all published tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def kind(self, tensor: PublishedTensor) -> str:
        """ "ternary", "int8" (values and scales that the source holds), or "float"."""
        if tensor.ours in self._ternary:
            return "ternary"
        if len(tensor.shape) < 2:
            return "float"
        if self.checkpoint.packed is not None:
            matrix = _stored(self.checkpoint.packed, tensor.ours)
            return "int8" if matrix.form.startswith("int8") else "float"
        held = self.checkpoint.quantised(tensor.ours)
        return "float" if held is None else held.kind

    def quantised(self, tensor: PublishedTensor) -> Quantised:
        """A matrix of kind "ternary" or "int8"."""
        if self._last is None or self._last[0] != tensor.ours:
            self._last = tensor.ours, self._whole(tensor.ours)
        whole = self._last[1]
        return whole if tensor.rows is None else whole.part(tensor.rows)

    def floats(self, tensor: PublishedTensor) -> Iterator[Floats]:
        """A tensor of kind "float" in blocks of rows, float32."""
        if self.checkpoint.packed is not None:
            values = _packed_floats(self.checkpoint.packed, tensor)
            values = values if tensor.rows is None else values[tensor.rows]
            yield from (values[rows] for rows in steps(values.shape))
            return
        first = 0 if tensor.rows is None else tensor.rows.start
        for rows in steps(tensor.shape):
            yield self.checkpoint.read(tensor.ours, slice(first + rows.start, first + rows.stop))

    def _whole(self, ours: str) -> Quantised:
        if self.checkpoint.packed is not None:
            return _packed_matrix(self.checkpoint.packed, ours, ternary=ours in self._ternary)
        held = self.checkpoint.quantised(ours)
        return one_scale(self.checkpoint, ours) if held is None else held


def steps(shape: tuple[int, ...], unit: int = 1) -> Iterator[slice]:
    """Slices of the rows of a tensor, each of whole units of rows."""
    width = int(np.prod(shape[1:], dtype=np.int64)) or 1
    step = max(1, _BLOCK_ELEMENTS // width // unit) * unit
    return (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))


def _stored(reader: PackedReader, ours: str) -> Matrix:
    return next(matrix for matrix in reader.layout.matrices if ours in matrix.sources)


def _packed_floats(reader: PackedReader, tensor: PublishedTensor) -> Floats:
    if len(tensor.shape) == 1:
        return reader.read_float32(tensor.ours)
    values, scale = reader.matrix(tensor.ours.removesuffix(".weight"))
    assert scale is None
    assert _is_float(values)
    return values


def _packed_matrix(reader: PackedReader, ours: str, *, ternary: bool) -> Quantised:
    """A matrix of a packed directory, whose values are unpacked when they are first read."""
    matrix = _stored(reader, ours)
    assert matrix.scale is not None
    scale = reader.read(matrix.scale).astype(np.float32, copy=False)
    rows, columns = matrix.shape
    group = columns // scale.shape[1] if scale.ndim == 2 else 0
    unpacked: list[NDArray[np.int8]] = []

    def read(part: slice) -> NDArray[np.int8]:
        if not unpacked:
            values, _ = reader.matrix(ours.removesuffix(".weight"))
            unpacked.append(values.astype(np.int8, copy=False))
        return unpacked[0][part]

    return Quantised("ternary" if ternary else "int8", (rows, columns), group, scale, read)


def _is_float(values: NDArray[np.int8] | Floats) -> TypeGuard[Floats]:
    return values.dtype == np.float32
