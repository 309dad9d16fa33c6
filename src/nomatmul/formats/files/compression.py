"""Files compressed with gzip, bzip2, xz or zstd, told by their first bytes and read in one pass.

zstd needs the `zstandard` package (part of the `train` extra).
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

MAGIC_BYTES = 6
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_STEP = 2048  # compressed bytes at a time: what comes of them has at most 64 MB


def compression_of(head: bytes) -> str | None:
    """ "gzip", "bzip2", "xz", "zstd", or None, from a file's first MAGIC_BYTES bytes."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def decompressed(file: IO[bytes], compression: str, name: str) -> IO[bytes]:
    """The decompressed bytes of `file`, which is closed with the result; `name` is for errors.

    Raises ValueError when zstd is needed and not installed. Reading raises EOFError for a file that
    was cut short, and the libraries' own errors for other damage.
    """
    return io.BufferedReader(_Decompressed(file, _factory(compression, name)))


def _factory(compression: str, name: str) -> Callable[[], Any]:
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31)  # with gzip's header and checksum
    if compression == "bzip2":
        return bz2.BZ2Decompressor
    if compression == "xz":
        return lzma.LZMADecompressor
    assert compression == "zstd"
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{name} is zstd: pip install zstandard to read it") from None
    decompressor: Any = zstandard.ZstdDecompressor()
    return lambda: decompressor.decompressobj()


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of a stream that need not be seekable.

    Several compressed files put together (as `pzstd` and `cat` make them) are read to the end, and
    a file that was cut short is an error; zstandard's own reader does neither.
    """

    def __init__(self, file: IO[bytes], factory: Callable[[], Any]) -> None:
        self._file = file
        self._factory = factory
        self._frame: Any = None
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            block = self._file.read(_STEP)
            if not block:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("Compressed file ended before its last frame did")
                return 0
            self._waiting = memoryview(self._decompress(block))
        count = min(len(buffer), len(self._waiting))
        buffer[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            if self._frame is None or self._frame.eof:
                block = block.lstrip(b"\0")  # padding, as tapes and xz have it
                if not block:
                    break
                self._frame = self._factory()
            parts.append(self._frame.decompress(block))
            block = self._frame.unused_data if self._frame.eof else b""
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()
        super().close()
