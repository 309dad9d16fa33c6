"""The tensors of a packed encoder by the names of a training checkpoint, for code that trains on.

What was rounded when it was packed stays rounded: these are the values that the engine computes
with. Legend: R rows of a layer's trees, D hidden size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.architecture import Shape, architecture_of
from nomatmul.formats.encoder import with_classifier
from nomatmul.formats.files.source import TensorSource
from nomatmul.formats.packed.reader import PackedReader


class PackedEncoderSource(TensorSource):
    """Floats of a packed directory that holds an encoder."""

    nested = False

    def __init__(self, reader: PackedReader) -> None:
        assert reader.reading is not None, "decoders keep ternary values, which are no floats"
        self._reader, self.left_out = reader, dict[str, str]()
        tensors = architecture_of(reader.config).tensors()
        self._shapes = with_classifier(tensors, reader.config, reader.reading)
        self._matrix = {name: m for m in reader.layout.matrices for name in m.sources}
        self._last = ("", np.empty(0, np.float32))  # the parts of a matrix are read in a row

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes)

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        values = self._read(name)
        return values if rows is None else values[rows]

    def _read(self, name: str) -> NDArray[np.float32]:
        matrix = self._matrix.get(name)
        if matrix is None:
            return self._reader.read_float32(name)
        if matrix.name != self._last[0]:
            self._last = matrix.name, self._reader.floats(matrix)
        values = self._last[1]
        kind = name.rpartition(".")[2]
        if kind == "weight":
            return values[matrix.part(name)]
        return np.ascontiguousarray(values[:, ("w_in", "w_out").index(kind)])  # of [R, 2, D]
