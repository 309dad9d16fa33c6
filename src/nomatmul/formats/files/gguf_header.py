"""The header of a GGUF file: its metadata and the entries of its tensors, nothing trusted.

Every count and length is held against the bytes that are left before anything is made of it, so
that a damaged header costs no memory. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomatmul.formats.errors import FormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 28
MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_STRING_BYTES = 65535, 64, 1 << 26
MAX_DIMENSIONS = 4
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_LEAST_KEY = 8 + 4 + 1  # bytes of a key without a name and a value of one byte
_LEAST_ENTRY = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Entry:
    """What the header says of a tensor: numpy's order of sizes, ggml's number of its type, and
    the byte where it begins, counted from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int


@dataclass(frozen=True)
class Header:
    """metadata: {key: bool, int, float, str, list of str or bools, or array of numbers}."""

    metadata: dict[str, Any]
    entries: list[Entry]
    alignment: int
    data_start: int


def read_header(data: memoryview, path: Path) -> Header:
    """Read the header at the start of a file's bytes. Raises FormatError in one line."""
    cursor = _Cursor(data, path)
    if bytes(data[:4]) != MAGIC:
        raise FormatError(f"{path} is no GGUF file: it begins with {bytes(data[:4])!r}")
    cursor.at = 4
    _check_version(cursor.u32("the version"), path)
    tensors = cursor.count("tensors", _LEAST_ENTRY)
    keys = cursor.count("metadata keys", _LEAST_KEY)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise FormatError(f"{path} has the metadata key {key!r} twice")
        metadata[key] = cursor.value(key)
    entries = [cursor.entry() for _ in range(tensors)]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise FormatError(f"{path} has the tensor {entry.name!r} twice")
        seen.add(entry.name)
    alignment = _alignment(metadata, path)
    return Header(metadata, entries, alignment, -(-cursor.at // alignment) * alignment)


def _check_version(version: int, path: Path) -> None:
    if version & 0xFFFF == 0 and version:
        raise FormatError(f"{path} is a big-endian GGUF file, which is not read")
    if version not in VERSIONS:
        legal = " or ".join(map(str, VERSIONS))
        raise FormatError(f"{path} is GGUF of version {version}; it must be {legal}")


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value < 1 << 31 or value & (value - 1):
        raise FormatError(f"{path}: {ALIGNMENT_KEY} {value!r} must be a power of 2")
    return value


class _Cursor:
    """Walks over the header; no step leaves the file, or its first MAX_HEADER_BYTES."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def take(self, length: int, what: str) -> memoryview:
        """The next `length` bytes."""
        if length > self.end - self.at:
            whole = len(self.data) == self.end
            limit = f"the file's {self.end}" if whole else f"the {self.end} that a header may have"
            raise FormatError(
                f"{self.path} is truncated or damaged: {what} at byte {self.at} needs {length}"
                f" bytes of {limit}"
            )
        found = self.data[self.at : self.at + length]
        self.at += length
        return found

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, least_bytes: int) -> int:
        """A number of things that need `least_bytes` each."""
        found = self.u64(f"the number of {what}")
        left = self.end - self.at
        if found > left // least_bytes:
            raise FormatError(
                f"{self.path} is truncated or damaged: it claims {found} {what}, but {left} bytes"
                " follow"
            )
        return found

    def text(self, what: str, limit: int) -> str:
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise FormatError(f"{self.path}: {what} has {length} bytes; at most {limit} are read")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: {what} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.u32(f"the type of {key!r}")
        if kind == STRING:
            return self.text(f"the value of {key!r}", MAX_STRING_BYTES)
        if kind == ARRAY:
            return self._array(key)
        if kind not in NUMBERS:
            raise FormatError(f"{self.path}: {key!r} has the unknown type {kind}")
        dtype = NUMBERS[kind]
        number = np.frombuffer(self.take(dtype.itemsize, f"the value of {key!r}"), dtype)
        return self._bools(key, number)[0] if kind == BOOL else number[0].item()

    def _array(self, key: str) -> Any:
        kind = self.u32(f"the type of {key!r}")
        if kind == ARRAY:
            raise FormatError(f"{self.path}: {key!r} is an array of arrays, which is not read")
        if kind == STRING:
            count = self.count(f"strings of {key!r}", 8)
            return [self._element(key) for _ in range(count)]
        if kind not in NUMBERS:
            raise FormatError(f"{self.path}: {key!r} has elements of the unknown type {kind}")
        dtype = NUMBERS[kind]
        count = self.count(f"elements of {key!r}", dtype.itemsize)
        numbers = np.frombuffer(self.take(count * dtype.itemsize, f"{key!r}"), dtype)
        return self._bools(key, numbers) if kind == BOOL else numbers.copy()

    def _element(self, key: str) -> str:
        """One string of an array: `text` without its words, which vocabularies have no time for."""
        at = self.at + 8
        if at <= self.end:
            (length,) = struct.unpack_from("<Q", self.data, self.at)
            if length <= min(self.end - at, MAX_STRING_BYTES):
                self.at = at + length
                try:
                    return str(self.data[at : self.at], "utf-8")
                except UnicodeDecodeError:
                    raise FormatError(f"{self.path}: a string of {key!r} is not UTF-8") from None
        return self.text(f"a string of {key!r}", MAX_STRING_BYTES)

    def _bools(self, key: str, numbers: Any) -> list[bool]:
        if numbers.size and numbers.max() > 1:
            raise FormatError(f"{self.path}: {key!r} has the truth value {numbers.max()}")
        return [bool(number) for number in numbers]

    def entry(self) -> Entry:
        name = self.text("a tensor's name", MAX_NAME_BYTES)
        what = f"the entry of {name!r}"
        dimensions = self.u32(what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise FormatError(
                f"{self.path}: {name!r} has {dimensions} dimensions; it must have 1 to"
                f" {MAX_DIMENSIONS}"
            )
        sizes = [self.u64(what) for _ in range(dimensions)]
        if not all(0 < size < 1 << 40 for size in sizes):
            raise FormatError(f"{self.path}: {name!r} has the illegal shape {sizes}")
        return Entry(name, tuple(reversed(sizes)), self.u32(what), self.u64(what))
