"""Where a checkpoint's tensors lie: one safetensors file, several, or torch's own pickles.

Each source gives names, shapes and float32 tensors (whole, or some rows), one at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.json import read_json_object
from nomatmul.formats.files.pickles import TorchSource
from nomatmul.formats.files.safetensors import FLOAT_DTYPES, SafetensorsFile
from nomatmul.formats.files.source import TensorSource

SINGLE, SINGLE_INDEX = "model.safetensors", "model.safetensors.index.json"
__all__ = ["TensorSource", "open_source"]

TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")


def open_source(directory: Path) -> TensorSource:
    """Find the weights in `directory`; safetensors are preferred to pickles.

    Raises FormatError when there are none, or when an index disagrees with its files.
    """
    if (directory / SINGLE).exists():
        return SafetensorsSource({"": directory / SINGLE}, None)
    if (directory / SINGLE_INDEX).exists():
        index = read_index(directory / SINGLE_INDEX)
        return SafetensorsSource({f: directory / f for f in set(index.values())}, index)
    if (directory / TORCH).exists():
        return TorchSource([directory / TORCH], None)
    if (directory / TORCH_INDEX).exists():
        index = read_index(directory / TORCH_INDEX)
        return TorchSource([directory / f for f in sorted(set(index.values()))], index)
    if parts := _unlisted_parts(directory, SINGLE):
        return SafetensorsSource({part.name: part for part in parts}, None)
    if parts := _unlisted_parts(directory, TORCH):
        return TorchSource(parts, None)
    others = sorted(path.name for path in directory.glob("*") if path.suffix in _SUFFIXES)
    found = f"; {others[0]} has another name" if others else ""
    raise FormatError(
        f"{directory} holds no weights: none of {SINGLE}, {SINGLE_INDEX}, {TORCH}, {TORCH_INDEX}"
        + found
    )


def _unlisted_parts(directory: Path, whole: str) -> list[Path]:
    """The parts of the file `whole` where no index lists them, by the count in their names.

    Raises FormatError where one is missing, or names speak of several counts.
    """
    stem, suffix = whole.split(".")
    pattern = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.{suffix}")
    found = {path.name: pattern.fullmatch(path.name) for path in directory.glob(f"*.{suffix}")}
    counts = sorted({match[2] for match in found.values() if match is not None})
    if len(counts) > 1:
        words = " and of ".join(map(str, map(int, counts)))
        raise FormatError(f"{directory} holds parts of {words}, and no index that lists them")
    wanted = [
        f"{stem}-{i + 1:05}-of-{count}.{suffix}" for count in counts for i in range(int(count))
    ]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FormatError(f"{directory} lacks {missing[0]}, and an index that lists its parts")
    return [directory / name for name in wanted]


class SafetensorsSource(TensorSource):
    """Tensors of one or several safetensors files; without an index each file has its own."""

    def __init__(self, paths: dict[str, Path], index: dict[str, str] | None) -> None:
        files = {key: SafetensorsFile(path) for key, path in paths.items()}
        self._file_of: dict[str, SafetensorsFile] = {}
        self.nested = False
        self.left_out: dict[str, str] = {}
        self._bytes_in: dict[str, SafetensorsFile] = {}
        for key, file in files.items():
            for name, info in file.infos.items():
                if index is not None and index.get(name) != key:
                    raise FormatError(f"{file.path} holds {name!r}, which the index puts elsewhere")
                if name in self._file_of or name in self.left_out:
                    raise FormatError(f"{file.path} holds {name!r}, as another part does")
                if info.dtype in FLOAT_DTYPES:
                    self._file_of[name] = file
                else:
                    self.left_out[name] = info.dtype
                    if info.dtype in ("I8", "U8", "U32"):
                        self._bytes_in[name] = file
        for name, key in (index or {}).items():
            if name not in files[key].infos:
                raise FormatError(f"{files[key].path} lacks {name!r}, which the index puts there")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.infos[name].shape for name, file in self._file_of.items()}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return self._file_of[name].read_float32(name, rows)

    def byte_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.infos[name].shape for name, file in self._bytes_in.items()}

    def read_bytes(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return self._bytes_in[name].read(name, rows)


def read_index(path: Path) -> dict[str, str]:
    """{tensor: name of the file that holds it} of an index; raises FormatError."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set("/\\\0") & set(file):
            raise FormatError(f"{path}: {name!r} lies in {file!r}, which is no plain file name")
    return weight_map
