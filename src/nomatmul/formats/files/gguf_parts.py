"""One model in several GGUF files, as llama-gguf-split and llama.cpp's converter write large ones.

Each part says which it is (split.no, from 0), of how many (split.count), and how many tensors all
have (split.tensors.count). The first holds the metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.gguf import GgufFile, GgufTensor
from nomatmul.formats.files.gguf_header import ALIGNMENT_KEY
from nomatmul.formats.files.gguf_names import PART_NAME, part_names, part_paths
from nomatmul.formats.files.quantised import Quantised

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_OWN = (_NUMBER, _COUNT, _TENSORS, ALIGNMENT_KEY)  # what a part says of itself alone


class GgufParts:
    """All parts of a model as one `GgufFile`: the metadata of the first, the tensors of all."""

    def __init__(self, files: list[GgufFile]) -> None:
        self._first = files[0]
        self.path, self.metadata = self._first.path, self._first.metadata
        self._file_of: dict[str, GgufFile] = {}
        for number, file in enumerate(files):
            _check_part(file, number, self._first, len(files))
            for name in file.tensors:
                if name in self._file_of:
                    other = self._file_of[name].path
                    raise FormatError(f"{file.path} has the tensor {name!r}, as {other.name} has")
                self._file_of[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self._file_of.items()}
        wanted = self.metadata.get(_TENSORS, len(self.tensors))
        if wanted != len(self.tensors):
            raise FormatError(
                f"{self.path}: the parts hold {len(self.tensors)} tensors; {_TENSORS} is {wanted!r}"
            )

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """As `GgufFile.read`."""
        return self._file(name).read(name, rows)

    def quantised(self, name: str) -> Quantised | None:
        """As `GgufFile.quantised`."""
        return self._file(name).quantised(name)

    def tensor(self, name: str) -> GgufTensor:
        """As `GgufFile.tensor`."""
        return self._file(name).tensor(name)

    def _file(self, name: str) -> GgufFile:
        return self._file_of.get(name, self._first)


def open_parts(path: str | Path) -> GgufFile | GgufParts:
    """Open a GGUF file; where it is a part of a model, whichever, all of its parts.

    Raises FormatError as `GgufFile`; and for a part whose name does not say which it is, that
    lacks another, or that is of another model than the first.
    """
    file = GgufFile(path)
    count = file.metadata.get(_COUNT, 0)
    if type(count) is int and count in (0, 1):
        return file
    paths = part_paths(file.path)
    if type(count) is not int or not part_names(file.path.name) or len(paths) != count:
        raise FormatError(
            f"{file.path} is one of {count!r} parts ({_COUNT}): their names must be {PART_NAME}"
            " and so on, in one directory"
        )
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        names = ", ".join(missing[:4]) + ("" if len(missing) <= 4 else ", ...")
        raise FormatError(f"{file.path} is one of {count} parts; its directory lacks {names}")
    return GgufParts([file if other == file.path else GgufFile(other) for other in paths])


def _check_part(file: GgufFile, number: int, first: GgufFile, count: int) -> None:
    """Refuse a file that is not part `number` of the model whose first part is given."""
    wanted: dict[str, Any] = {
        _NUMBER: number,
        _COUNT: count,
        _TENSORS: first.metadata.get(_TENSORS),
    }
    for key, value in wanted.items():
        found = file.metadata.get(key)
        if not _equal(found, value):
            raise FormatError(
                f"{file.path}: {key} is {found!r}; beside the other parts it must be {value!r}"
            )
    for key in file.metadata:
        if key not in _OWN and not _equal(file.metadata[key], first.metadata.get(key)):
            raise FormatError(
                f"{file.path}: {key} is not what {first.path.name}, the first part, says"
            )


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and np.array_equal(one, other)
