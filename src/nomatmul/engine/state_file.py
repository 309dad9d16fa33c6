"""A saved session: a safetensors file with a tensor a piece, and whose state it is in its metadata.

Pieces that grow are float16, float32, or int8 with scales, as they were kept. Version 1 held one
tensor "state", float32 [L, S]: the pieces of each layer side by side. Beside the pieces a file may
hold arrays of BESIDE, for whoever keeps a state together with what led to it.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.engine.state import Layout, Pieces
from nomatmul.formats.errors import FormatError, WriteError
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.paths import checked_path
from nomatmul.formats.files.safetensors import (
    Buffer,
    SafetensorsFile,
    TensorInfo,
    bytes_of,
    header_bytes,
)

FORMAT = "nomatmul-state"
VERSION = "2"
_KEYS = {"format", "format_version", "model", "position", "crc32"}


# Names of Piece.dtype in safetensors files.
_NAMES = {"f32": "F32", "f16": "F16", "i8": "I8"}
# Arrays of one dimension that may lie beside a state: the token ids that it has seen, and the
# logits behind the last one.
BESIDE = {"ids": "I32", "logits": "F32"}
_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "int32": "I32"}


def write_state(path: str | Path, arrays: Pieces, position: int, fingerprint: str) -> None:
    """Write the pieces of a state, whole or not at all.

    Raises WriteError (a ValueError and an OSError) when the disk refuses.
    """
    try:
        write_file(checked_path(path, "the state"), state_chunks(arrays, position, fingerprint))
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


def state_chunks(
    arrays: Pieces, position: int, fingerprint: str, beside: Pieces | None = None
) -> Iterator[Buffer]:
    """Yield the bytes of a file that holds a state, and arrays of BESIDE, piece by piece."""
    stored = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        for name, array in {**arrays, **(beside or {})}.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "model": fingerprint,
        "position": str(position),
        "crc32": _checksum(position, stored),
    }
    # the larger elements first: then each array lies at a multiple of its element's size; of these
    # what tells of the state, which is read without it
    order = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name not in BESIDE))
    tensors = {name: (_DTYPES[stored[name].dtype.name], stored[name].shape) for name in order}
    yield header_bytes(tensors, metadata)
    for name in order:
        yield bytes_of(stored[name])


def read_state(
    path: str | Path, layout: Layout, fingerprint: str, beside: Container[str] = ()
) -> tuple[dict[str, NDArray[Any]], int]:
    """Return ({piece: array of its dtype}, position) of a file that `write_state` wrote.

    beside: names of BESIDE that the file may hold; they are among the arrays then. Raises
    FormatError (a ValueError) for a file that is missing, foreign, truncated or changed, that
    belongs to another model, or that keeps keys and values in another form.
    """
    try:
        file = SafetensorsFile(checked_path(path, "the state"))
    except FormatError as error:
        raise FormatError(f"cannot read the state of a session: {error}") from None
    position = checked_position(file.path, file.metadata, fingerprint)
    wanted = {
        name: (_NAMES[layout.pieces[name].dtype], shape)
        for name, shape in layout.shapes(position).items()
    }
    if file.metadata["format_version"] == "1":
        if layout.grows:
            raise FormatError(f"{path} has state version '1', which holds no keys and values")
        wanted = {"state": ("F32", layout.fixed_shape)}
    wanted |= _beside(file.infos, beside)
    found = {name: (info.dtype, info.shape) for name, info in file.infos.items()}
    if found != wanted:
        for name in layout.growing:
            if name in found and found[name][0] != wanted[name][0]:
                raise FormatError(
                    f"{path} keeps keys and values as {found[name][0]}, the model is loaded with"
                    f" {wanted[name][0]}: load it with the other kv"
                )
        raise FormatError(f"{path} is damaged: its pieces are not those of the model's state")
    arrays = {name: _read(file, name, dtype) for name, (dtype, _) in wanted.items()}
    if file.metadata["crc32"] != _checksum(position, arrays):
        raise FormatError(f"{path} is damaged: it does not match its checksum")
    if file.metadata["format_version"] == "1":
        return layout.views(arrays["state"]), position
    return arrays, position


def _read(file: SafetensorsFile, name: str, dtype: str) -> NDArray[Any]:
    if dtype == "F32":
        return file.read_float32(name)
    array = file.read(name)
    # by its bits: widening keys and values takes longer than reading them
    if dtype == "F16" and np.any(array.view(np.uint16) & 0x7C00 == 0x7C00):
        raise FormatError(f"{file.path}: {name} holds a value that is not finite")
    return array


def _beside(
    infos: Mapping[str, TensorInfo], names: Container[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the arrays beside a state, of any length."""
    return {
        name: (dtype, infos[name].shape[:1])
        for name, dtype in BESIDE.items()
        if name in infos and name in names
    }


def checked_position(path: Path, metadata: Mapping[str, str], fingerprint: str) -> int:
    """Return the position in a file of this very model; raises FormatError for another one."""
    if metadata.get("format") != FORMAT or set(metadata) != _KEYS:
        raise FormatError(f"{path} is no state of a session")
    if metadata["format_version"] not in ("1", VERSION):
        raise FormatError(
            f"{path} has state version {metadata['format_version']!r};"
            f" this nomatmul reads versions 1 and {VERSION}"
        )
    if metadata["model"] != fingerprint:
        raise FormatError(f"{path} is the state of another model")
    position = metadata["position"]
    if not position.isascii() or not position.isdigit() or len(position) > 18:
        raise FormatError(f"{path} is damaged: its position is {position!r}")
    return int(position)


def _checksum(position: int, arrays: Pieces) -> str:
    """crc32 of the position and of all pieces in their order, as eight hexadecimal digits."""
    crc = zlib.crc32(str(position).encode())
    for array in arrays.values():
        crc = zlib.crc32(bytes_of(array), crc)
    return f"{crc:08x}"
