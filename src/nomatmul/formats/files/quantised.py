"""Matrices that a file holds quantised: whole numbers and their scales, which nothing rounds again.

Legend: N rows (outputs), K columns (inputs), G inputs that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError

# Inputs that may share a scale in the formats that we write; the kernels' groups.
GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True)
class Quantised:
    """A matrix [N, K] of value * scale.

    kind: "ternary" (values -1, 0, 1) or "int8". group: inputs that share a scale; 0: all of a row.
    scale: float32 [blocks] (the rows are split evenly over the blocks) where group is 0, else
    [N, K / group]. read: the values of some rows, int8 [n, K]. masters: rows of the floats that a
    reader made the values of, None where the file has values alone.
    """

    kind: str
    shape: tuple[int, int]
    group: int
    scale: NDArray[np.float32]
    read: Callable[[slice], NDArray[np.int8]]
    masters: Callable[[slice], NDArray[np.float32]] | None = None

    def rows_scale(self, rows: slice) -> NDArray[np.float32]:
        """The scales of some rows: float32 [n, K / group], of group 0 [n, 1]."""
        if self.group:
            return self.scale[rows]
        start, stop, _ = rows.indices(self.shape[0])
        block = np.arange(start, stop) * len(self.scale) // self.shape[0]
        return self.scale[block][:, None]

    def floats(self, rows: slice | None = None) -> NDArray[np.float32]:
        """Rows as value * scale, float32 [n, K]."""
        rows = slice(0, self.shape[0]) if rows is None else rows
        values, scale = self.read(rows), self.rows_scale(rows)
        size = self.group or self.shape[1]
        cut = values.reshape(len(values), scale.shape[1], size).astype(np.float32)
        cut *= scale[:, :, None]
        return cut.reshape(values.shape)

    def grouped(self, group: int) -> Quantised:
        """The same matrix with a scale a row and `group` inputs, which divides its own groups.

        Raises ValueError where it does not.
        """
        own = self.group or self.shape[1]
        if own % group or self.shape[1] % group:
            raise ValueError(f"groups of {own} inputs cannot be cut into groups of {group}")
        if group == self.group:
            return self
        scale = np.repeat(self.rows_scale(slice(0, self.shape[0])), own // group, axis=1)
        return Quantised(self.kind, self.shape, group, scale, self.read)

    def part(self, rows: slice) -> Quantised:
        """The rows start..stop as a matrix of their own.

        They hold whole blocks of rows that share a scale, or lie within one.
        """
        start, stop, _ = rows.indices(self.shape[0])
        if self.group:
            scale = self.scale[start:stop]
        else:
            size = self.shape[0] // len(self.scale)
            whole = start % size == 0 and stop % size == 0
            assert whole or start // size == (stop - 1) // size, f"rows {start}..{stop} of {size}"
            scale = self.scale[start // size : -(-stop // size)]

        def shifted(part: slice) -> slice:
            first, last, _ = part.indices(stop - start)
            return slice(start + first, start + last)

        def read(part: slice) -> NDArray[np.int8]:
            return self.read(shifted(part))

        return Quantised(self.kind, (stop - start, self.shape[1]), self.group, scale, read)

    def checked(self, name: str) -> Quantised:
        """Itself. Raises FormatError, naming the tensor, for scales that are not finite and above
        0, or that do not fit the matrix."""
        rows, columns = self.shape
        if self.group:
            fits = columns % self.group == 0 and self.scale.shape == (rows, columns // self.group)
        else:
            fits = self.scale.ndim == 1 and len(self.scale) > 0 and rows % len(self.scale) == 0
        if not fits:
            raise FormatError(
                f"{name}: scales {list(self.scale.shape)} do not fit {rows} rows of {columns}"
                f" inputs in groups of {self.group or columns}"
            )
        bad = self.scale[~(np.isfinite(self.scale) & (self.scale > 0))]
        if bad.size:
            raise FormatError(f"{name}: a scale is {bad.flat[0]}; scales are finite and above 0")
        return self


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """Matrices of one kind, group and row length, one above the other.

    Of group 0 each keeps its scales, so all need rows in the same proportion to their scales.
    """
    first, columns = parts[0], parts[0].shape[1]
    assert all((q.kind, q.group, q.shape[1]) == (first.kind, first.group, columns) for q in parts)
    if not first.group:
        sizes = {q.shape[0] // len(q.scale) for q in parts}
        size = math.gcd(*sizes)
        scale = np.concatenate(
            [np.repeat(q.scale, q.shape[0] // len(q.scale) // size) for q in parts]
        )
    else:
        scale = np.concatenate([q.scale for q in parts])
    starts = np.cumsum([0, *(q.shape[0] for q in parts)])
    total = int(starts[-1])

    def read(rows: slice) -> NDArray[np.int8]:
        return read_stacked([q.read for q in parts], starts, rows)

    floats = [q.masters for q in parts if q.masters is not None]

    def masters(rows: slice) -> NDArray[np.float32]:
        return read_stacked(floats, starts, rows)

    known = masters if len(floats) == len(parts) else None
    return Quantised(first.kind, (total, columns), first.group, scale, read, known)


def read_stacked(
    readers: Sequence[Callable[[slice], NDArray[Any]]], starts: NDArray[np.integer], rows: slice
) -> NDArray[Any]:
    """Rows of matrices that lie one above the other; `starts` [parts + 1] are their first rows."""
    begin, end, _ = rows.indices(int(starts[-1]))
    found = []
    for read, start, stop in zip(readers, starts[:-1], starts[1:], strict=True):
        low, high = max(begin, int(start)), min(end, int(stop))
        if low < high:
            found.append(read(slice(low - int(start), high - int(start))))
    if not found:
        return readers[0](slice(0, 0))
    return found[0] if len(found) == 1 else np.concatenate(found)
