"""Directories that appear whole or not at all, as `atomic` does for files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nomatmul.formats.files.atomic import share_files, sync_directory, write_file
from nomatmul.formats.files.gguf_names import part_paths


def write_json(path: Path, value: object) -> None:
    """`write_file` of JSON that people read too."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `path` when the block ends without an error.

    An older directory of that name is replaced. After an error nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        share_files(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_directory(temporary)
        if path.exists():
            _exchange(path, temporary)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def _exchange(path: Path, new: Path) -> None:
    """Give `new` the name of an older directory, which is deleted; after an error it is there."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:  # Ctrl-C between the two, too
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left half-written in `directory`."""
    for path in directory.glob(".*"):
        if path.name.endswith((".tmp", ".old")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def directory_bytes(directory: Path) -> int:
    """Bytes of the files in a directory, not of those below it."""
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())


def model_bytes(path: Path) -> int:
    """Bytes of a model: of a directory's files, or of a GGUF file with all its parts."""
    if path.is_dir():
        return directory_bytes(path)
    return sum(part.stat().st_size for part in part_paths(path) if part.is_file())


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
