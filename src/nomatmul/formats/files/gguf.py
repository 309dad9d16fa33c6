"""Reading one GGUF file (ggml's container): metadata and tensors, every claim checked before use.

The `gguf` package reads no ternary type but TQ1_0 and TQ2_0, and trusts what a file says. Here the
file is mapped and read row by row.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf_blocks import half
from nomatmul.formats.files.gguf_header import Entry, Header, read_header
from nomatmul.formats.files.gguf_types import OTHER_NAMES, TYPES, BlockType
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.safetensors import check_finite


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: layout, shape in numpy's order, byte offset in the file."""

    layout: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def type(self) -> str:
        """The name of its type, as ggml spells it."""
        return self.layout.name


class GgufFile:
    """One GGUF file whose header has been read and checked.

    `metadata` maps keys to bool, int, float, str, lists of these, or arrays of numbers; `tensors`
    maps a name to its GgufTensor. Raises FormatError (a ValueError) for a file that is missing,
    truncated, longer than its header says, big-endian, or whose header is malformed, names a
    tensor or a key twice, has tensors of types that are not read, or claims ranges that overlap,
    leave gaps or leave the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._bytes = _mapped(self.path)
        header = read_header(memoryview(self._bytes), self.path)
        self.metadata = header.metadata
        self.tensors = _located(header, len(self._bytes), self.path)

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a tensor, or rows start..stop of it, as finite float32: what ggml makes of it.

        Raises FormatError when a value is not finite, or not ternary in a ternary tensor.
        """
        tensor = self.tensor(name)
        if len(tensor.shape) == 1:
            return self._floats(name, tensor, slice(0, 1)).reshape(-1)[rows or slice(None)]
        start, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
        if start >= stop:
            return np.empty((0, *tensor.shape[1:]), np.float32)
        return self._floats(name, tensor, slice(start, stop)).reshape(-1, *tensor.shape[1:])

    def quantised(self, name: str) -> Quantised | None:
        """Return a matrix's values and scales as they are stored, or None for one of floats.

        A scale below 0 is given as its opposite, with the values' signs turned; one that is 0, as
        ggml writes it for a block of zeros, as another block's (or 1). Raises FormatError for
        scales that are not finite; reading raises it for values that a scale of 0 hides.
        """
        tensor = self.tensor(name)
        layout = tensor.layout
        if layout.kind == "float" or len(tensor.shape) != 2:
            return None
        count, width = tensor.shape
        raw = self._scale(tensor, slice(0, count))
        check_finite(raw, f"{self.path}: the scale of {name}")
        signs = np.sign(raw).astype(np.int8)
        group = 0 if layout.tail else layout.group

        def read(rows: slice) -> NDArray[np.int8]:
            start, stop, _ = rows.indices(count)
            if start >= stop:
                return np.empty((0, width), np.int8)
            values = self._integers(name, tensor, slice(start, stop))
            if not plain:
                turned = signs if layout.tail else signs[start:stop]
                values = self._signed(name, tensor, values, turned)
            return values.reshape(-1, width)

        plain = bool((signs > 0).all())
        sizes = np.abs(raw)
        scale = np.where(signs == 0, next(iter(sizes[signs != 0]), np.float32(1)), sizes)
        return Quantised(layout.kind, (count, width), group, scale, read)

    def tensor(self, name: str) -> GgufTensor:
        """Return what is known of a tensor; raises FormatError if the file does not hold it."""
        if name not in self.tensors:
            raise FormatError(f"{self.path} holds no tensor {name!r}")
        return self.tensors[name]

    def _floats(self, name: str, tensor: GgufTensor, rows: slice) -> NDArray[np.float32]:
        """Rows as float32 [blocks, group]."""
        if tensor.layout.kind == "float":
            values = tensor.layout.decode(self._blocks(tensor, rows))
            values = values.astype(np.float32, copy=False)
        else:
            scale = self._scale(tensor, rows).reshape(-1, 1)
            check_finite(scale, f"{self.path}: {name}")
            stored = self._integers(name, tensor, rows)
            self._check_zeros(name, tensor, stored, scale == 0)
            values = stored * scale
        check_finite(values, f"{self.path}: {name}")
        return values

    def _integers(self, name: str, tensor: GgufTensor, rows: slice) -> NDArray[np.int8]:
        """The stored whole numbers of rows [blocks, group]."""
        values = tensor.layout.decode(self._blocks(tensor, rows))
        assert values.dtype == np.int8
        if tensor.layout.kind == "ternary" and values.size and values.max() > 1:
            stray = float((values > 1).mean())
            raise FormatError(
                f"{self.path}: {name} is {tensor.type} but not ternary: {stray:.2%} of its codes"
                " stand for +2"
            )
        return values.astype(np.int8, copy=False)

    def _signed(
        self, name: str, tensor: GgufTensor, values: NDArray[np.int8], signs: NDArray[np.int8]
    ) -> NDArray[np.int8]:
        """Values [blocks, group] with the signs of their scales."""
        turned = signs.reshape(-1, 1)
        self._check_zeros(name, tensor, values, turned == 0)
        if values.size and ((values == -128) & (turned < 0)).any():
            raise FormatError(f"{self.path}: {name} holds -128 with a scale below 0")
        return values * turned

    def _check_zeros(
        self, name: str, tensor: GgufTensor, values: NDArray[np.int8], zero: NDArray[np.bool_]
    ) -> None:
        """Refuse blocks whose scale is 0 (zero: [blocks or 1, 1]) and whose values are not, but for
        values that can be none."""
        if tensor.layout.signs:
            return
        if zero.any() and (zero & (values != 0)).any():
            raise FormatError(f"{self.path}: {name} has a scale of 0 beside values that are not 0")

    def _scale(self, tensor: GgufTensor, rows: slice) -> NDArray[np.float32]:
        """The stored scales of rows [rows, blocks a row], or the only one [1]."""
        if tensor.layout.tail:
            at = tensor.offset + tensor.nbytes - tensor.layout.tail
            return np.frombuffer(self._bytes, "<f4", 1, at).astype(np.float32)
        scale = half(self._blocks(tensor, rows), tensor.layout.scale_at)
        return scale.reshape(rows.stop - rows.start, -1)

    def _blocks(self, tensor: GgufTensor, rows: slice) -> NDArray[np.uint8]:
        """The blocks of rows (of 1-D tensors: of all) [blocks, bytes], in the mapped file."""
        layout = tensor.layout
        row = math.prod(tensor.shape[1:] or tensor.shape) // layout.group * layout.size
        count = (rows.stop - rows.start) * row
        at = tensor.offset + rows.start * row
        return np.frombuffer(self._bytes, np.uint8, count, at).reshape(-1, layout.size)


def _mapped(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:  # nothing to map
        raise FormatError(f"{path} is no GGUF file: it is empty") from None


def _located(header: Header, file_size: int, path: Path) -> dict[str, GgufTensor]:
    """Give each tensor its layout and place; refuse overlaps, gaps and what leaves the file."""
    found: dict[str, GgufTensor] = {}
    order = sorted(header.entries, key=lambda entry: entry.offset)
    ends = [entry.offset for entry in order[1:]] + [file_size - header.data_start]
    expected = 0
    for i, (entry, end) in enumerate(zip(order, ends, strict=bool(order))):
        if entry.offset != expected:
            what = "overlaps another tensor" if entry.offset < expected else "leaves a gap"
            raise FormatError(
                f"{path}: the data of {entry.name!r} at {entry.offset} {what}; it must begin at"
                f" {expected}"
            )
        room = _Room(end - entry.offset, header.alignment, last=i + 1 == len(order))
        layout = _layout(entry, room, path)
        nbytes = _nbytes(entry, layout)
        expected += _padded(nbytes, header.alignment)
        place = header.data_start + entry.offset
        found[entry.name] = GgufTensor(layout, entry.shape, place, nbytes)
    return {entry.name: found[entry.name] for entry in header.entries}


@dataclass(frozen=True)
class _Room:
    """Bytes from a tensor's beginning to the next one's, or to the end of the file."""

    nbytes: int
    alignment: int
    last: bool

    def fits(self, nbytes: int) -> bool:
        """Does a tensor of so many bytes fill it, but for the padding?"""
        padded = _padded(nbytes, self.alignment)
        return nbytes <= self.nbytes <= padded if self.last else self.nbytes == padded


def _layout(entry: Entry, room: _Room, path: Path) -> BlockType:
    """The layout of a tensor, which for some types only the tensor's bytes tell."""
    what = f"{path}: {entry.name!r}"
    if entry.number not in TYPES:
        known = OTHER_NAMES.get(entry.number, f"number {entry.number}")
        raise FormatError(f"{what} is of the type {known}, which is not read")
    width, choices = entry.shape[-1], TYPES[entry.number]
    whole = [layout for layout in choices if width % layout.group == 0]
    if not whole:
        raise FormatError(
            f"{what} has rows of {width} weights, but {choices[0].name} has blocks of"
            f" {choices[0].group}"
        )
    fitting = [layout for layout in whole if room.fits(_nbytes(entry, layout))]
    if not fitting:
        sizes = [_nbytes(entry, layout) for layout in whole]
        words = f"{whole[0].name} {list(entry.shape)} of {' or '.join(map(str, sizes))} bytes"
        if room.last and room.nbytes < min(sizes):
            raise FormatError(
                f"{path} is truncated: of the tensor {entry.name!r}, {words},"
                f" {max(0, room.nbytes)} are there"
            )
        raise FormatError(
            f"{what} is {words}, but the file has {room.nbytes} for it (it is longer than its"
            " header says, or of a layout that is not known)"
        )
    if len({layout.size for layout in fitting}) > 1:
        raise FormatError(
            f"{what} is {fitting[0].name} in {room.nbytes} bytes, which blocks of"
            f" {' and of '.join(str(layout.group) for layout in fitting)} weights both fill"
        )
    return fitting[0]


def _nbytes(entry: Entry, layout: BlockType) -> int:
    return math.prod(entry.shape) // layout.group * layout.size + layout.tail


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
