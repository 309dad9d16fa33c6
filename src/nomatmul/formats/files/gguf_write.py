"""Writing a GGUF file (version 3, little-endian), tensor by tensor, whole or not at all."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.gguf_blocks import Bytes
from nomatmul.formats.files.gguf_encode import WRITTEN, WrittenType
from nomatmul.formats.files.gguf_header import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    MAX_STRING_BYTES,
    NUMBERS,
    STRING,
)

_VERSION = 3
_KINDS = {dtype: number for number, dtype in NUMBERS.items() if number != BOOL}


@dataclass(frozen=True)
class GgufRows:
    """A tensor to write: its name, its shape in numpy's order, one of `WRITTEN`, and the bytes of
    its blocks, a few rows at a time."""

    name: str
    shape: tuple[int, ...]
    type: str
    blocks: Callable[[], Iterable[Bytes]]

    @property
    def layout(self) -> WrittenType:
        """How ggml lays it out."""
        return WRITTEN[self.type]

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.shape) // self.layout.group * self.layout.size


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: list[GgufRows],
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """Write a file under a temporary name and rename it.

    metadata: {key: bool, str, a numpy scalar, a list of strings, or an array of numbers}.
    Raises FormatError for a string or name that is too long, a row that no whole number of blocks
    makes, or a tensor that gives other bytes than its shape asks for; OSError when the disk is
    full. Nothing is left then.
    """
    for tensor in tensors:
        if tensor.shape[-1] % tensor.layout.group:
            raise FormatError(
                f"{tensor.name!r} has rows of {tensor.shape[-1]} weights, but {tensor.type} has"
                f" blocks of {tensor.layout.group}"
            )
    write_file(path, _content(metadata, tensors, progress))


def _content(
    metadata: Mapping[str, Any],
    tensors: list[GgufRows],
    progress: Callable[[int, int, str], None],
) -> Iterator[Bytes | bytes]:
    header = b"".join(_header(metadata, tensors))
    yield header
    yield _padding(len(header))
    for done, tensor in enumerate(tensors):
        progress(done, len(tensors), tensor.name)
        found = 0
        for block in tensor.blocks():
            found += block.nbytes
            yield block
        if found != tensor.nbytes:
            raise FormatError(f"{tensor.name!r} has {found} bytes, its shape asks {tensor.nbytes}")
        yield _padding(found)
    progress(len(tensors), len(tensors), "")


def _header(metadata: Mapping[str, Any], tensors: list[GgufRows]) -> Iterator[bytes]:
    yield MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        yield _string(key, MAX_KEY_BYTES, "a metadata key")
        yield _value(key, value)
    offset = 0
    for tensor in tensors:
        yield _string(tensor.name, MAX_NAME_BYTES, "a tensor's name")
        sizes = tuple(reversed(tensor.shape))
        number = tensor.layout.number
        yield struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)
        offset += tensor.nbytes + len(_padding(tensor.nbytes))


def _value(key: str, value: Any) -> bytes:
    what = f"the value of {key!r}"
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value, MAX_STRING_BYTES, what)
    if isinstance(value, list):
        texts = [_string(text, MAX_STRING_BYTES, f"a string of {key!r}") for text in value]
        return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(texts)
    assert isinstance(value, np.ndarray | np.generic), f"{key!r} has the type {type(value)}"
    number = struct.pack("<I", _KINDS[value.dtype])
    if isinstance(value, np.generic):
        return number + value.tobytes()
    return struct.pack("<I", ARRAY) + number + struct.pack("<Q", value.size) + value.tobytes()


def _string(text: str, limit: int, what: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{what} is no Unicode text: {text[:60]!r}") from None
    if len(data) > limit:
        raise FormatError(f"{what} has {len(data)} bytes; at most {limit} can be written")
    return struct.pack("<Q", len(data)) + data


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % DEFAULT_ALIGNMENT)
