"""Float matrices whose values are ternary: -s, 0 or s, with one s for a group of inputs of a row.

Checkpoints trained with ternary weights are often published as floats. What they share a scale for
(a tensor, a block of rows, a shard of columns, a group of inputs) is found, and every element is
compared with it; nothing is rounded. Legend: N rows, K columns, U = 32 inputs or, where 32 does
not divide K, all K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.files.quantised import GROUPS, Quantised
from nomatmul.formats.quantise import fits_float16

Floats = NDArray[np.float32]
Read = Callable[[slice], Floats]

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TernaryValues:
    """What a scan found: every element is -s, 0 or s.

    group: the most inputs (of GROUPS) that share a scale everywhere; 0 where no group divides the
    rows. scales: in words, what has one scale. empty: all elements are zero. half: float16 holds
    every scale exactly.
    """

    group: int
    scales: str
    empty: bool
    half: bool


def scan(read: Read, shape: tuple[int, int]) -> TernaryValues | None:
    """Compare every element of a matrix; None at the first that no scale explains."""
    unit = _unit(shape[1])
    shared = {group: True for group in GROUPS if shape[1] % group == 0}
    row_scales: list[Floats] = []
    columns, by_columns, half = np.zeros(shape[1] // unit, np.float32), True, True
    for rows in _blocks(shape):
        peaks = _peaks(block := np.abs(read(rows)), unit)
        if not _explained(block, peaks):
            return None
        for group in [group for group, holds in shared.items() if holds]:
            shared[group] = _equal(peaks.reshape(len(peaks), -1, group // unit))
        half = half and fits_float16(peaks)
        row_scales.append(peaks.max(axis=1) if _equal(peaks) else peaks[:0, 0])
        before, columns = columns, np.maximum(columns, peaks.max(axis=0))
        by_columns &= _equal(np.stack([before, *peaks]).T)
    found = np.concatenate(row_scales)
    words = _words(found if len(found) == shape[0] else None, columns if by_columns else None, unit)
    group = max((group for group, holds in shared.items() if holds), default=0)
    words = words or f"{group or unit} inputs of a row"
    return TernaryValues(group, words, not columns.any(), half)


def stray_share(read: Read, shape: tuple[int, int], tolerance: float = 0.0) -> float:
    """The share of elements that are neither 0 nor their group's usual magnitude, give or take
    `tolerance` of it."""
    unit, strays = _unit(shape[1]), 0
    for rows in _blocks(shape):
        sizes = np.sort(np.abs(read(rows)).reshape(-1, unit), axis=1)
        zeros = np.sum(sizes == 0, axis=1)
        middle = np.minimum((zeros + unit) // 2, unit - 1)
        usual = np.take_along_axis(sizes, middle[:, None], axis=1)
        strays += int(np.sum((sizes != 0) & (np.abs(sizes - usual) > tolerance * usual)))
    return strays / max(1, shape[0] * shape[1])


def ternary_matrix(read: Read, shape: tuple[int, int], group: int) -> Quantised:
    """The matrix, of which `scan` found that each `group` inputs share a scale.

    Groups of zeros have any scale: that of their row, else of the matrix, else 1.
    """
    scale = np.concatenate([_peaks(np.abs(read(rows)), group) for rows in _blocks(shape)])
    rows = scale.max(axis=1, keepdims=True)
    rows[rows == 0] = scale.max() or 1.0
    scale = np.where(scale == 0, rows, scale)

    def values(rows: slice) -> NDArray[np.int8]:
        return np.sign(read(rows)).astype(np.int8)

    return Quantised("ternary", shape, group, scale, values)


def _unit(columns: int) -> int:
    return columns if columns % GROUPS[-1] else GROUPS[-1]


def _blocks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def _peaks(sizes_NK: Floats, unit: int) -> Floats:
    """The largest magnitude of each group, [N, K / unit]."""
    peaks: Floats = sizes_NK.reshape(len(sizes_NK), -1, unit).max(axis=2)
    return peaks


def _explained(sizes_NK: Floats, peaks: Floats) -> bool:
    """Whether every magnitude is 0 or its group's largest."""
    sizes = sizes_NK.reshape(*peaks.shape, -1)
    return bool(np.all((sizes == 0) | (sizes == peaks[:, :, None])))


def _equal(peaks: Floats) -> bool:
    """Whether what is not zero is equal along the last axis."""
    return bool(np.all((peaks == 0) | (peaks == peaks.max(axis=-1, keepdims=True))))


def _words(row_scales: Floats | None, columns: Floats | None, unit: int) -> str | None:
    """What has one scale: scales of whole rows [N] or of units of columns [K / U] say so."""
    if row_scales is not None:
        run = _run(row_scales)
        if run == len(row_scales):
            return "a tensor"
        return "a row" if run == 1 else f"a block of {run} rows"
    if columns is not None and (run := _run(columns)) > 1:
        return f"a shard of {run * unit} columns"
    return None


def _run(scales: Floats) -> int:
    """The most neighbours that share a scale all along, in even runs (zeros share any)."""
    count = len(scales)
    for parts in range(1, count + 1):
        if count % parts == 0 and _equal(scales.reshape(parts, -1)):
            return count // parts
    raise AssertionError("a scale always shares itself")
