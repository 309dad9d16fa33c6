"""Named states: what is kept beside a state that stays until it is forgotten, and its file."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import check_keys, read_json_object

_NAMING_BYTES, _ID_BYTES = 512, 36  # of a named state on its own, and for each of its ids


@dataclass(frozen=True)
class Naming:
    """A named state: what it has read, and the request that it was made of."""

    ids: tuple[int, ...]
    document: str = ""

    @property
    def nbytes(self) -> int:
        """About what it takes in memory, and not less than in its file."""
        return _NAMING_BYTES + _ID_BYTES * len(self.ids) + len(self.document)


def naming_file(name: str, naming: Naming) -> bytes:
    """The contents of a named state's file."""
    content = {"name": name, "ids": list(naming.ids), "document": naming.document}
    text = json.dumps(content)
    return json.dumps({**content, "crc32": f"{zlib.crc32(text.encode()):08x}"}).encode()


def read_naming(path: Path) -> tuple[str, Naming]:
    """(name, named state) of a file; raises FormatError for one that is not what it was."""
    content = read_json_object(path)
    check_keys(f"key of {path.name}", content, {"name", "ids", "document", "crc32"})
    crc = content.pop("crc32")
    if crc != f"{zlib.crc32(json.dumps(content).encode()):08x}":
        raise FormatError("it does not match its checksum")
    return content["name"], Naming(tuple(content["ids"]), content["document"])
