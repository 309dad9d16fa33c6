"""The matrices of a packed model, made of a checkpoint's tensors a few rows at a time.

What comes quantised keeps its whole numbers and scales; everything else is quantised once.
Legend: N/K rows and columns of a matrix, G inputs that share a scale, R rows of trees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.checkpoint import Checkpoint
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.packed.layout import Matrix
from nomatmul.formats.quantise import (
    absmean_scale,
    quantise_rows,
    ternarise,
    to_bfloat16,
    to_float16,
)

Floats = NDArray[np.float32]

_BLOCK_ELEMENTS = 1 << 18


class MatrixSource:
    """One matrix of a packed model: its scales and its stored rows."""

    def __init__(self, checkpoint: Checkpoint, matrix: Matrix) -> None:
        self._checkpoint, self._matrix = checkpoint, matrix
        self._held = _held(checkpoint, matrix)
        self._scale: Floats | None = None

    def scale(self) -> NDArray[Any]:
        """The scales in the dtype in which they are stored."""
        return self._scales().astype(np.float16 if self._matrix.scale_form == "f16" else np.float32)

    def rows(self) -> Iterator[NDArray[Any]]:
        """Blocks of rows in the matrix's form; ternary ones as int8 of -1, 0, 1."""
        if self._held is not None:
            for rows in _steps(self._matrix.shape[0], self._matrix.shape[1]):
                yield self._held.read(rows)
            return
        for block in self._values():
            yield self._stored(block)

    def _scales(self) -> Floats:
        if self._held is not None:
            return self._held.scale
        if self._scale is None:
            self._scale = self._computed()
        return self._scale

    def _computed(self) -> Floats:
        if self._matrix.packed:
            names = self._matrix.sources
            scales = [absmean_scale(blocks(self._checkpoint, name)) for name in names]
            return np.array(scales, dtype=np.float32)
        return np.concatenate([quantise_rows(block)[1] for block in self._values()])

    def _stored(self, block: Floats) -> NDArray[Any]:
        if self._matrix.packed:
            scale = self._scales()
            if block.ndim == 2:
                return ternarise(block, scale[0])
            return np.stack([ternarise(block[:, i], s) for i, s in enumerate(scale)], axis=1)
        form = self._matrix.form
        if form == "int8":
            return quantise_rows(block)[0]
        if form == "f16":
            return self._half(block)
        return to_bfloat16(block) if form == "bf16" else block

    def _half(self, block: Floats) -> NDArray[np.float16]:
        stored = to_float16(block)
        if not np.all(np.isfinite(stored)):
            largest = np.abs(block).max()
            raise ValueError(
                f"{self._matrix.name}: f16 cannot hold {largest:g}, only up to 65504; bf16 and f32"
                " can"
            )
        return stored

    def _values(self) -> Iterator[Floats]:
        """Blocks of rows, float32 [n, K], of trees [n, 2, K]."""
        parts = [blocks(self._checkpoint, source) for source in self._matrix.sources]
        if len(self._matrix.shape) == 2:
            yield from itertools.chain(*parts)
        else:  # a node's input and output weights side by side
            for pair in zip(*parts, strict=True):
                yield np.stack(pair, axis=1)


def one_scale(checkpoint: Checkpoint, name: str) -> Quantised:
    """A matrix of latent floats, made ternary by one absmean scale: what training computes with."""
    scale = np.array([absmean_scale(blocks(checkpoint, name))], dtype=np.float32)

    def read(rows: slice) -> NDArray[np.int8]:
        return ternarise(checkpoint.read(name, rows), scale[0])

    rows, columns = checkpoint.shape(name)
    return Quantised("ternary", (rows, columns), 0, scale, read)


def _held(checkpoint: Checkpoint, matrix: Matrix) -> Quantised | None:
    """What the file holds of a matrix, where the packed one keeps it."""
    if len(matrix.sources) != 1 or len(matrix.shape) != 2:
        return None
    if not matrix.packed and matrix.form != "int8-32":
        return None
    held = checkpoint.quantised(next(iter(matrix.sources)))
    assert held is not None or matrix.packed, f"{matrix.name} was never int8"
    return held


def blocks(checkpoint: Checkpoint, name: str) -> Iterator[Floats]:
    """A tensor a few rows at a time: quantising makes several copies of what it is given."""
    for block in checkpoint.read_blocks(name):
        for rows in _steps(len(block), max(1, block[0].size)):
            yield block[rows]


def _steps(count: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // width)
    return (slice(at, min(at + step, count)) for at in range(0, count, step))
