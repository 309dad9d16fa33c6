"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes | Iterable[Any], *, sync: bool = True) -> None:
    """Write a file through a temporary one beside it, flushed to disk and then renamed.

    sync: False for what need not survive the machine's sudden end, only this process's.

    content: its bytes, or pieces of them (bytes, memoryviews), one behind the other.
    After an error nothing is left, and an older file of that name is as it was. What is no file (a
    pipe, /dev/null, /dev/stdout) is written to, not replaced; of a symbolic link its target is
    replaced. Raises OSError with the file's name in it (a full disk is reported without one).
    """
    whole = isinstance(content, bytes | bytearray | memoryview)
    parts: Iterable[Any] = (content,) if whole else content
    if path.exists() and not (path.is_file() or path.is_dir()):
        _write_through(path, parts)
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise named(error, path) from None
    if sync:
        sync_directory(path.parent)


def check_writable(path: Path) -> None:
    """Raises ValueError where no file of this name can be written, before the work for it."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a file to write")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is no directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")


def _write_through(path: Path, parts: Iterable[Any]) -> None:
    try:
        with open(path, "wb") as stream:
            stream.writelines(parts)
    except OSError as error:
        raise named(error, path) from None


def named(error: BaseException, path: Path) -> BaseException:
    """The error with the file's name in it, if it is an OSError without one."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return OSError(error.errno, error.strerror, str(path))
    return error


def share_files(directory: Path) -> None:
    """Give all files in a directory that this process made the permissions of its new files.

    The process's umask has decided the directory's own. Libraries that write through temporary
    files (safetensors) leave theirs to the owner alone.
    """
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def sync_directory(path: Path) -> None:
    """Make renames in `path` last. Not every file system can: then nothing happens."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
