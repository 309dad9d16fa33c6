"""What every reader of weights answers, whatever the files."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.files.quantised import Quantised


class TensorSource(Protocol):
    """Named tensors, read one at a time.

    nested: do the tensors lie one level deep in a larger dict?
    left_out: {name: dtype} of stored tensors that are no floats (packed weights, buffers of whole
    numbers, masks); only families that pack their weights read some of them.
    """

    nested: bool
    left_out: dict[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of all float tensors, quantised ones among them."""
        ...

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or some of its rows, as finite float32; raises FormatError."""
        ...

    def quantised(self, name: str) -> Quantised | None:
        """The whole numbers and scales that the file holds of a tensor; None for plain floats."""
        return None

    def byte_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name: shape} of the tensors of `left_out` that are int8, uint8, or uint32 (words
        of packed codes)."""
        return {}

    def read_bytes(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """Return one of `byte_shapes`, or some of its rows, as stored."""
        raise AssertionError(f"{name} is no tensor of bytes")
