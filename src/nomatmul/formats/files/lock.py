"""A directory that one process at a time may write to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = "nomatmul.lock"  # holds the number and the host of the process that has, or had, it


def lock_directory(directory: Path, what: str, by: str) -> int:
    """The handle of a directory's lock, which is this process's until it is closed.

    Raises ValueError where another process has it, naming it: "WHAT DIRECTORY is in use by another
    BY (process 12 on HOST)".
    """
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(handle, 300, 0).decode("utf-8", "replace").strip() or "unknown"
        os.close(handle)
        raise ValueError(
            f"{what} {directory} is in use by another {by} (process {holder})"
        ) from None
    except OSError:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def locked(directory: Path, what: str, by: str) -> Iterator[None]:
    """`lock_directory` while the block runs."""
    handle = lock_directory(directory, what, by)
    try:
        yield
    finally:
        os.close(handle)
