"""A saved session: a safetensors file with a tensor a piece, and whose state it is in its metadata.

Pieces that grow are float16, float32, or int8 with scales, as they were kept. Version 1 held one
tensor "state", float32 [L, S]: the pieces of each layer side by side.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from nomatmul.engine.state import Layout, Pieces
from nomatmul.formats.errors import FormatError, WriteError
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.safetensors import SafetensorsFile

FORMAT = "nomatmul-state"
VERSION = "2"
_KEYS = {"format", "format_version", "model", "position", "crc32"}


# Names of Piece.dtype in safetensors files.
_NAMES = {"f32": "F32", "f16": "F16", "i8": "I8"}


def write_state(path: str | Path, arrays: Pieces, position: int, fingerprint: str) -> None:
    """Write the pieces of a state, whole or not at all.

    Raises WriteError (a ValueError and an OSError) when the disk refuses.
    """
    stored = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        for name, array in arrays.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "model": fingerprint,
        "position": str(position),
        "crc32": _checksum(position, stored),
    }
    try:
        write_file(Path(path), safetensors.numpy.save(stored, metadata))
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from None


def read_state(
    path: str | Path, layout: Layout, fingerprint: str
) -> tuple[dict[str, NDArray[Any]], int]:
    """Return ({piece: array of its dtype}, position) of a file that `write_state` wrote.

    Raises FormatError (a ValueError) for a file that is missing, foreign, truncated or changed,
    that belongs to another model, or that keeps keys and values in another form.
    """
    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise FormatError(f"cannot read the state of a session: {error}") from None
    position = _checked_metadata(file, fingerprint)
    wanted = {
        name: (_NAMES[layout.pieces[name].dtype], shape)
        for name, shape in layout.shapes(position).items()
    }
    if file.metadata["format_version"] == "1":
        if layout.grows:
            raise FormatError(f"{path} has state version '1', which holds no keys and values")
        wanted = {"state": ("F32", layout.fixed_shape)}
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
    if dtype == "I8":
        return file.read(name)
    # float16 is checked as float32, which holds it exactly
    return file.read_float32(name).astype(np.float16 if dtype == "F16" else np.float32, copy=False)


def _checked_metadata(file: SafetensorsFile, fingerprint: str) -> int:
    """The position in a file of this very model."""
    metadata, path = file.metadata, file.path
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
        crc = zlib.crc32(array.tobytes(), crc)
    return f"{crc:08x}"
