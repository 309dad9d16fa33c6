"""Reading one safetensors file, tensor by tensor, with every claim of its header checked.

The library's numpy front end knows no bfloat16 and gives whole tensors; packing and loading need
rows and reading into memory that the caller owns. Format: 8 bytes little-endian length of the
header, a JSON header {name: {dtype, shape, data_offsets}}, then the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import JsonObject, read_json_object
from nomatmul.formats.quantise import from_bfloat16, from_float8, from_float16

# A bytearray, memoryview or array: their common type has a name from Python 3.12 on.
Buffer: TypeAlias = Any

MAX_HEADER_BYTES = 100_000_000

# bfloat16 and 8-bit floats are unknown to numpy: their bits are kept as whole numbers.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", *_FLOAT8)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype as safetensors spells it, shape, byte offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One safetensors file whose header has been read and checked.

    `infos` maps a name to its TensorInfo, `metadata` holds the strings of "__metadata__".
    Raises FormatError (a ValueError) for a file that is missing, truncated, longer than its
    header says, or whose header is no JSON, names a tensor twice, or claims ranges that
    overlap, leave gaps or leave the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                file_size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(file, file_size, self.path)
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
        self.data_start = data_start
        self.file_size = file_size
        self.metadata = _checked_metadata(header.pop("__metadata__", {}), self.path)
        self.infos = {
            name: _checked_info(name, entry, data_start, self.path)
            for name, entry in header.items()
        }
        _check_coverage(self.infos, data_start, file_size, self.path)

    def info(self, name: str) -> TensorInfo:
        """Return the TensorInfo of `name`; raises FormatError if the file does not hold it."""
        if name not in self.infos:
            raise FormatError(f"{self.path} holds no tensor {name!r}")
        return self.infos[name]

    def read_into(self, name: str, buffer: Buffer) -> None:
        """Fill `buffer` (writable, exactly the tensor's bytes) with the stored bytes."""
        info = self.info(name)
        view = memoryview(buffer).cast("B")
        if view.nbytes != info.nbytes:
            raise ValueError(f"{name} has {info.nbytes} bytes, the buffer {view.nbytes}")
        self._fill(view, info.offset)

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """Return the tensor, or rows start..stop of it, in its stored dtype (BF16 as uint16, 8-bit
        floats as uint8)."""
        info = self.info(name)
        dtype = NUMPY_DTYPES[info.dtype]
        shape, offset = info.shape, info.offset
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
            shape = (max(0, stop - start), *shape[1:])
        array = np.empty(shape, dtype=dtype)
        self._fill(bytes_of(array), offset)
        return array

    def read_float32(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """Return a float tensor (or rows of it) as float32.

        Raises FormatError when the stored dtype is no float or a value is not finite.
        """
        dtype = self.info(name).dtype
        if dtype not in FLOAT_DTYPES:
            raise FormatError(f"{self.path}: {name} has dtype {dtype}, expected a float")
        stored = self.read(name, rows)
        if dtype == "BF16":
            values = from_bfloat16(stored)
        elif dtype in _FLOAT8:
            values = from_float8(stored, dtype)
        else:
            values = from_float16(stored) if dtype == "F16" else narrow_to_float32(stored)
        check_finite(values, f"{self.path}: {name}")
        return values

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                while done < view.nbytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise FormatError(f"{self.path} ended while it was read")
                    done += count
        except OSError as error:
            raise FormatError(f"cannot read {self.path}: {error.strerror or error}") from None


def read_one(path: Path, name: str) -> tuple[dict[str, str], set[str], NDArray[Any]]:
    """Return (metadata, names of all tensors, one tensor as stored) of a file.

    What the header claims of the others is not checked: for lists of many files. Raises FormatError
    as SafetensorsFile does.
    """
    try:
        with open(path, "rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, file_size, path)
            metadata = _checked_metadata(header.pop("__metadata__", {}), path)
            info = _checked_info(name, header.get(name), data_start, path)
            file.seek(info.offset)
            data = file.read(info.nbytes) if info.offset + info.nbytes <= file_size else b""
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) != info.nbytes:
        raise FormatError(f"{path} is truncated: {name!r} lies behind its end")
    array = np.frombuffer(data, NUMPY_DTYPES[info.dtype]).reshape(info.shape)
    return metadata, set(header), array


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    flat: Buffer = array.reshape(-1)
    return memoryview(flat).cast("B")


def header_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str], align: int = 8
) -> bytes:
    """The start of a file that holds {name: (dtype, shape)} in this order, without gaps.

    Data begins at a multiple of `align` bytes.
    """
    header: JsonObject = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // align) * align - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def narrow_to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Convert to float32; what does not fit becomes infinite, for the caller to refuse."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def check_finite(values: NDArray[np.floating], what: str) -> None:
    """Raise FormatError naming `what` if a value is NaN or infinite."""
    # A sum of finite float32 cannot overflow float64; NaN and infinity always show in it.
    with np.errstate(invalid="ignore"):  # infinity less infinity is found, too
        total = np.sum(values, dtype=np.float64)
    if not np.isfinite(total):
        raise FormatError(f"{what} holds a value that is not finite (NaN or infinity)")


def _read_header(file: BinaryIO, file_size: int, path: Path) -> tuple[JsonObject, int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FormatError(f"{path} is no safetensors file: it has only {len(prefix)} bytes")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, file_size - 8):
        raise FormatError(
            f"{path} is truncated or no safetensors file: it claims a header of {length} bytes"
            f" in a file of {file_size}"
        )
    data = file.read(length)
    if len(data) != length or not data.startswith(b"{"):
        raise FormatError(f"{path} is no safetensors file: its header is no JSON object")
    return read_json_object(f"the header of {path}", data), 8 + length


def _checked_metadata(metadata: object, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map names to strings")
    return metadata


def _checked_info(name: str, entry: object, data_start: int, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: the header entry of {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise FormatError(f"{path}: {name!r} has the unknown dtype {json.dumps(dtype)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{path}: {name!r} has a malformed shape or data range")
    begin, end = offsets
    nbytes = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise FormatError(
            f"{path}: {name!r} is {dtype} {shape}, {nbytes} bytes, but its range"
            f" {begin}..{end} is {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + begin, nbytes)


def _is_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in values
    )


def _check_coverage(
    infos: dict[str, TensorInfo], data_start: int, file_size: int, path: Path
) -> None:
    """Refuse ranges that overlap, leave gaps, or disagree with the length of the file."""
    expected = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != expected:
            what = "overlaps another tensor" if info.offset < expected else "leaves a gap"
            raise FormatError(f"{path}: the data range of {name!r} {what}")
        expected += info.nbytes
    if expected != file_size:
        kind = "truncated" if file_size < expected else "longer than its header says"
        raise FormatError(f"{path} is {kind}: {file_size} bytes, expected {expected}")
