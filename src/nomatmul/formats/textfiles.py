"""Text files as people keep them: plain or compressed with gzip, bzip2, xz or zstd.

The compression is told from the first bytes, not from the name. zstd needs the `zstandard`
package (part of the `train` extra).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, cast

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def compression_of(path: Path | str) -> str | None:
    """ "gzip", "bzip2", "xz", "zstd", or None for a plain file. Raises OSError when unreadable."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def open_binary(path: Path | str) -> IO[bytes]:
    """The file's decompressed bytes as a stream.

    A pipe is read as it is: it can be opened only once, so nobody may look at its first bytes.
    Raises OSError when it cannot be read and ValueError when zstd is needed and not installed.
    """
    if Path(path).is_fifo():
        return open(path, "rb")
    compression = compression_of(path)
    if compression == "gzip":
        import gzip

        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == "bzip2":
        import bz2

        return cast(IO[bytes], bz2.open(path, "rb"))
    if compression == "xz":
        import lzma

        return cast(IO[bytes], lzma.open(path, "rb"))
    if compression == "zstd":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path} is zstd: pip install zstandard to read it") from None
        return cast(IO[bytes], io.BufferedReader(_Zstd(path, zstandard.ZstdDecompressor())))
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a zstd file. zstandard's own reader stops after the first of several
    frames (which `pzstd` and `cat` make) and takes a file that was cut short for a whole one."""

    _STEP = 2048  # compressed bytes at a time: what comes of them has at most 64 MB

    def __init__(self, path: Path | str, decompressor: Any) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._decompressor = decompressor
        self._frame: Any = None
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            block = self._file.read(self._STEP)
            if not block:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("Compressed file ended before its last frame did")
                return 0
            self._waiting = memoryview(self._decompressed(block))
        count = min(len(buffer), len(self._waiting))
        buffer[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _decompressed(self, block: bytes) -> bytes:
        parts = []
        while block:
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            parts.append(self._frame.decompress(block))
            block = self._frame.unused_data if self._frame.eof else b""
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_text(path: Path | str, max_bytes: int | None = None) -> str:
    """The text of a file, UTF-8.

    max_bytes: stop there (a character cut in two at that border is left off).
    Raises ValueError naming the file when it is damaged, not UTF-8 or empty; OSError when absent.
    """
    with open_binary(path) as file:
        data = _read(file, path, max_bytes)
    if not data:
        raise ValueError(f"{path} is empty")
    return _decode(data, path, cut=max_bytes is not None and len(data) == max_bytes)


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
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if cut and error.start >= len(data) - 3:
            return data[: error.start].decode("utf-8")
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
