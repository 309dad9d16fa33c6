"""Ternary matrices of our own training checkpoints, where they are more than one scale of |W|.

A matrix with scales of blocks of rows or of groups of inputs is quantised here, by absmean, as
training does. A model that was loaded with published values and scales is saved with these
(`NAME.values`, `NAME.scale` in place of `NAME.weight`), and nothing quantises them again.

Legend: N/K rows and columns of a matrix, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.architecture import Shape, architecture_of
from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.source import TensorSource
from nomatmul.formats.quantise import absmean_groups, absmean_scale, ternarise

STORED_KEY = "stored_linears"
"""Key of a config.json whose model holds published values and scales."""

_BLOCK_ELEMENTS = 1 << 20


class TrainedSource(TensorSource):
    """The tensors of a training checkpoint, by our names."""

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        self._source, self.nested = source, source.nested
        self._scales, self._held = _scale_shapes(config), dict[str, Quantised]()
        bytes_of = source.byte_shapes()
        self._stored = {
            name: bytes_of[_beside(name, "values")]
            for name in self._scales
            if _beside(name, "values") in bytes_of
        }
        used = {_beside(name, "values") for name in self._stored}
        self.left_out = {n: dtype for n, dtype in source.left_out.items() if n not in used}

    def shapes(self) -> dict[str, Shape]:
        scales = {_beside(name, "scale") for name in self._stored}
        found = {n: shape for n, shape in self._source.shapes().items() if n not in scales}
        return {**found, **self._stored}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        if name in self._stored:
            return self._kept(name).floats(rows)
        return self._source.read(name, rows)

    def quantised(self, name: str) -> Quantised | None:
        if name in self._stored:
            return self._kept(name)
        if self._scales.get(name, (1,)) == (1,):
            return None  # one scale of latent weights, which whoever packs them finds
        return self._of_latents(name)

    def byte_shapes(self) -> dict[str, Shape]:
        return {n: s for n, s in self._source.byte_shapes().items() if n in self.left_out}

    def read_bytes(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return self._source.read_bytes(name, rows)

    def _kept(self, name: str) -> Quantised:
        """Values and scales as stored. Raises FormatError for what is no ternary matrix."""
        if name in self._held:
            return self._held[name]
        values, scale = _beside(name, "values"), _beside(name, "scale")
        shape = self._source.shapes().get(scale)
        if shape != self._scales[name] or len(self._stored[name]) != 2:
            raise FormatError(
                f"{scale!r} has shape {None if shape is None else list(shape)}, the config asks"
                f" for {list(self._scales[name])}"
            )

        def read(rows: slice) -> NDArray[np.int8]:
            found: NDArray[np.int8] = self._source.read_bytes(values, rows)
            if found.dtype != np.int8 or np.any((found < -1) | (found > 1)):
                raise FormatError(f"{values!r} holds values other than -1, 0 and 1")
            return found

        held = self._quantised(name, self._stored[name], self._source.read(scale), read)
        return self._held.setdefault(name, held.checked(name))

    def _of_latents(self, name: str) -> Quantised:
        if name in self._held:
            return self._held[name]
        shape = self._source.shapes()[name]
        scale = self._absmean(name, shape)

        def read(rows: slice) -> NDArray[np.int8]:
            weight = self._source.read(name, rows)
            scales = held.rows_scale(rows)[:, :, None]
            cut = weight.reshape(len(weight), scales.shape[1], -1)
            return ternarise(cut, scales).reshape(weight.shape)

        held = self._quantised(name, shape, scale, read)
        return self._held.setdefault(name, held)

    def _absmean(self, name: str, shape: Shape) -> NDArray[np.float32]:
        wanted = self._scales[name]
        if len(wanted) == 2:
            group = shape[1] // wanted[1]
            found = [
                absmean_groups(self._source.read(name, rows), group)
                for rows in _steps(0, shape[0], shape[1])
            ]
            return np.concatenate(found)
        size = shape[0] // wanted[0]
        return np.array(
            [
                absmean_scale(self._source.read(name, rows) for rows in _steps(at, size, shape[1]))
                for at in range(0, shape[0], size)
            ],
            np.float32,
        )

    def _quantised(
        self, name: str, shape: Shape, scale: NDArray[np.float32], read: Any
    ) -> Quantised:
        rows, columns = shape
        group = columns // scale.shape[1] if scale.ndim == 2 else 0
        return Quantised("ternary", (rows, columns), group, scale, read)


def _scale_shapes(config: ModelConfig) -> dict[str, Shape]:
    """{name of a ternary matrix: shape of its scales}."""
    model = architecture_of(config)
    found = {
        f"{name}.weight": linear.scale_shape
        for name, linear in model.linears().items()
        if linear.kind == "ternary" and not linear.tied
    }
    if model.embedding.kind == "ternary":
        found["embedding.weight"] = model.embedding.scale_shape
    return found


def _beside(name: str, what: str) -> str:
    return f"{name.removesuffix('.weight')}.{what}"


def _steps(start: int, count: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // width)
    return (slice(at, min(at + step, start + count)) for at in range(start, start + count, step))
