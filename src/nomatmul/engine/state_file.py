"""A saved session: a safetensors file with a tensor a piece, and whose state it is in its metadata.

Version 1 held one tensor "state", float32 [L, S]: the pieces of each layer side by side.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from nomatmul.engine.state import Float, Layout
from nomatmul.formats.errors import FormatError, WriteError
from nomatmul.formats.files.atomic import write_file
from nomatmul.formats.files.safetensors import SafetensorsFile

FORMAT = "nomatmul-state"
VERSION = "2"
_KEYS = {"format", "format_version", "model", "position", "crc32"}


def write_state(
    path: str | Path, arrays: Mapping[str, Float], position: int, fingerprint: str
) -> None:
    """Write the pieces of a state, whole or not at all.

    Raises WriteError (a ValueError and an OSError) when the disk refuses.
    """
    stored = {name: np.ascontiguousarray(array, "<f4") for name, array in arrays.items()}
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


def read_state(path: str | Path, layout: Layout, fingerprint: str) -> tuple[dict[str, Float], int]:
    """Return ({piece: float32}, position) of a file that `write_state` wrote.

    Raises FormatError (a ValueError) for a file that is missing, foreign, truncated or changed,
    or that belongs to another model.
    """
    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise FormatError(f"cannot read the state of a session: {error}") from None
    position = _checked_metadata(file, fingerprint)
    shapes = layout.shapes(position)
    if file.metadata["format_version"] == "1":
        shapes = {"state": layout.fixed_shape}
    if {name: (info.dtype, info.shape) for name, info in file.infos.items()} != {
        name: ("F32", shape) for name, shape in shapes.items()
    }:
        raise FormatError(f"{path} is damaged: its pieces are not those of the model's state")
    arrays = {name: file.read_float32(name) for name in shapes}
    if file.metadata["crc32"] != _checksum(position, arrays):
        raise FormatError(f"{path} is damaged: it does not match its checksum")
    if file.metadata["format_version"] == "1":
        return layout.views(arrays["state"]), position
    return arrays, position


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


def _checksum(position: int, arrays: Mapping[str, Float]) -> str:
    """crc32 of the position and of all pieces in their order, as eight hexadecimal digits."""
    crc = zlib.crc32(str(position).encode())
    for array in arrays.values():
        crc = zlib.crc32(array.tobytes(), crc)
    return f"{crc:08x}"
