"""Text files as people keep them: plain or compressed, from a disk, a pipe or standard input.

Every file is opened once and read from its first byte, so that a pipe loses nothing. What a file is
(compressed, UTF-16, JSON, a picture) is told from its contents, see compression.py and contents.py.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path
from typing import IO, Any, cast

from nomatmul.formats.files.compression import MAGIC_BYTES, compression_of, decompressed
from nomatmul.formats.files.contents import HEAD_BYTES, check_text, json_layout, refuse_foreign

STANDARD_INPUT = "-"


def open_binary(path: Path | str) -> IO[bytes]:
    """The file's decompressed bytes as a stream; "-" is standard input.

    Raises OSError when it cannot be read and ValueError when zstd is needed and not installed.
    """
    file = open_raw(path)
    head = _read_up_to(file, MAGIC_BYTES)
    whole = _Joined(head, file)
    compression = compression_of(head)
    if compression is not None:
        return decompressed(cast(IO[bytes], whole), compression, str(path))
    return io.BufferedReader(whole, 1 << 16)


def open_raw(path: Path | str) -> IO[bytes]:
    """The bytes as they are.

    Raises OSError; ValueError for a device, which may have no end, and a closed standard input.
    """
    if str(path) != STANDARD_INPUT:
        file = open(path, "rb")  # noqa: SIM115 - returned open
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
            file.close()
            raise ValueError(f"{path} is a device, not a file of text")
        return file
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed, so no text can be read from it")
    return cast(IO[bytes], _NotClosed(sys.stdin.buffer))


def open_table(path: Path | str) -> IO[bytes]:
    """`open_binary` for a table of text: raises ValueError when its beginning is something else."""
    file = open_binary(path)
    try:
        head = _read(file, path, HEAD_BYTES)
        refuse_foreign(head, path)
        text = head.decode("utf-8", "replace").removeprefix("\ufeff")  # its reader names the line
        if json_layout(text, whole=len(head) < HEAD_BYTES) is not None:
            raise ValueError(f"{path} holds JSON, not tab-separated values")
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(_Joined(head, file), 1 << 16)


class _NotClosed(io.RawIOBase):
    """Standard input, which stays open for those who come later."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # every binary file has it, which IO[bytes] does not say
        return int(self._file.readinto(buffer))  # type: ignore[attr-defined]


class _Joined(io.RawIOBase):
    """What has been read of a file already, then the rest of it."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            # as above
            return int(self._file.readinto(buffer))  # type: ignore[attr-defined]
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_head(path: Path | str) -> tuple[bytes, bool]:
    """The first HEAD_BYTES of the (decompressed) file, and whether that is all of it.

    For files that can be opened again. Raises as `read_text` does.
    """
    with open_binary(path) as file:
        head = _read(file, path, HEAD_BYTES + 1)
    return head[:HEAD_BYTES], len(head) <= HEAD_BYTES


def read_text(path: Path | str, max_bytes: int | None = None) -> str:
    """The text of a file, UTF-8, without a byte order mark; "-" is standard input.

    max_bytes: stop there (a character cut in two at that border is left off).
    Raises ValueError naming the file when it is damaged, empty, or no plain UTF-8 text (UTF-16,
    JSON, a binary format); OSError when absent.
    """
    with open_binary(path) as file:
        data = _read(file, path, max_bytes)
    if not data:
        raise ValueError(f"{path} is empty")
    cut = max_bytes is not None and len(data) == max_bytes
    head = check_text(data[:HEAD_BYTES], path, whole=not cut and len(data) <= HEAD_BYTES)
    if json_layout(head, whole=not cut and len(data) <= HEAD_BYTES) is not None:
        raise ValueError(
            f"{path} holds JSON, not plain text: take the texts out first, for example with"
            f" `jq -r .text {path}`"
        )
    return _decode(data, path, cut=cut)


def _read(file: IO[bytes], path: Path | str, max_bytes: int | None) -> bytes:
    try:
        return file.read() if max_bytes is None else _read_up_to(file, max_bytes)
    except OSError as error:
        if error.errno is not None:  # a failing disk: the system's own words do
            raise
        raise ValueError(f"{path}: damaged compressed file ({error})") from None
    except Exception as error:  # EOFError, LZMAError, zlib.error, ZstdError have no common base
        raise ValueError(f"{path}: damaged compressed file ({error})") from None


def _read_up_to(file: IO[bytes], max_bytes: int) -> bytes:
    parts, left = [], max_bytes
    while left > 0:
        part = file.read(left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _decode(data: bytes, path: Path | str, cut: bool) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if cut and error.start >= len(data) - 3:
            return data[: error.start].decode("utf-8")
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
