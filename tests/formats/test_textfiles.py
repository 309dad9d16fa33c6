"""Texts are read plain or compressed, whatever the name says, and damage is one line."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import threading

import numpy as np
import pytest

from nomatmul.formats.files.texts import read_text

TEXT = "First line\nzweite Zeile \u00fc\u00f6\u00e4\n" * 50


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data)


PACKERS = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": _zstd,
}
ZSTD = pytest.param("zstd", marks=pytest.mark.train)  # its package is of that extra


@pytest.mark.parametrize("kind", ["plain", "gzip", "bzip2", "xz", ZSTD])
def test_every_compression_is_read(tmp_path, kind):
    path = tmp_path / "text"
    path.write_bytes(PACKERS[kind](TEXT.encode()))
    assert read_text(path) == TEXT


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", ZSTD])
def test_truncated_files_are_refused(tmp_path, kind):
    path = tmp_path / "text"
    noise = np.random.default_rng(0).integers(32, 127, 300_000).astype(np.uint8).tobytes()
    for whole in (TEXT.encode(), noise):  # one block, and several of which some are whole
        data = PACKERS[kind](whole)
        for length in (len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(ValueError, match=r"text: damaged compressed file"):
                read_text(path)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", ZSTD])
def test_files_put_together_are_read_to_the_end(tmp_path, kind):
    path = tmp_path / "text"
    parts = [TEXT, "", "x" * 5000, TEXT]
    path.write_bytes(b"".join(PACKERS[kind](part.encode()) for part in parts))
    assert read_text(path) == "".join(parts)
    assert read_text(path, max_bytes=100) == TEXT.encode()[:100].decode()


def test_a_pipe_is_read_from_its_first_byte(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(TEXT,))
    writer.start()
    assert read_text(path) == TEXT
    writer.join()


@pytest.mark.parametrize("kind", ["plain", "bzip2"])
def test_max_bytes_never_cuts_a_character(tmp_path, kind):
    path = tmp_path / "text"
    path.write_bytes(PACKERS[kind](TEXT.encode()))
    for limit in range(1, 60):
        found = read_text(path, max_bytes=limit)
        assert TEXT.startswith(found)
        assert limit - 2 < len(found.encode()) <= limit


def test_other_mistakes(tmp_path):
    path = tmp_path / "text"
    with pytest.raises(FileNotFoundError):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_text(path)
    path.write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(path)
