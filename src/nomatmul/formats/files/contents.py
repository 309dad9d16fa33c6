"""What a file of text is, told from its first bytes: plain UTF-8, JSON, or something to be refused.

Nothing is trained on or scored because its name looked like text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

HEAD_BYTES = 1 << 16
PARQUET = b"PAR1"
_BINARY = {
    PARQUET: "a parquet file",
    b"ARROW1": "an Arrow file: save it as parquet or JSON lines",
    b"PK\x03\x04": "a zip archive or an office document: take the text out first",
    b"%PDF-": "a PDF document: take the text out first",
    b"{\\rtf": "an RTF document: take the text out first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it first, or use gzip, bzip2, xz or zstd",
    b"\x1f\x9d": "compressed with compress: unpack it first, or use gzip, bzip2, xz or zstd",
    b"\x1f\x8b": "compressed twice: unpack it once",
    b"SQLite format 3\x00": "an SQLite database: take the text out first",
}
_MOST_LINES = 100  # to look at
_LARGEST_VALUE = 1 << 28  # characters of one JSON value
# How JSON begins: an object with a name, or an array of objects, strings, numbers or arrays.
_OPENING = re.compile(
    r'\s*(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:'
    r'|\s*\[\s*(?:"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|\[)\s*[,\]]'
)
_BETWEEN = re.compile(r"[\s,]*")


def check_text(head: bytes, path: Path | str, *, whole: bool) -> str:
    """The beginning of a file as text, without a byte order mark.

    head: its first bytes; whole: they are all of it, else a character may be cut at the end.
    Raises ValueError saying what the file is when it is not UTF-8 text.
    """
    refuse_foreign(head, path)
    try:
        return head.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        if not whole and error.start >= len(head) - 6:
            return head[: error.start].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "ignore")
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def refuse_foreign(head: bytes, path: Path | str) -> None:
    """Raise ValueError saying what the file is when it begins as another format or encoding."""
    found = _foreign(head)
    if found is not None:
        raise ValueError(f"{path} is {found}")


def _foreign(head: bytes) -> str | None:
    for magic, words in _BINARY.items():
        if head.startswith(magic):
            return words
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return _wide("UTF-32")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _wide("UTF-16")
    if b"\0" not in head:
        return None
    even, odd = head[::2].count(0), head[1::2].count(0)
    if 4 * max(even, odd) > len(head) // 2 > 8 * min(even, odd):  # Latin letters have a zero half
        return _wide("UTF-16BE" if even > odd else "UTF-16LE")
    return "binary data, not text (it has zero bytes)"


def _wide(encoding: str) -> str:
    return f"{encoding}, not UTF-8 text: convert it with `iconv -f {encoding} -t UTF-8`"


def json_layout(head: str, *, whole: bool) -> str | None:
    """How a file holds JSON, from its beginning: "lines", "values" or None for no JSON.

    "lines": an object a line. "values": an array, or objects one after another, over several lines.
    """
    text = head.lstrip()
    if not text.startswith(("{", "[")):
        return None
    lines = text.split("\n")[: _MOST_LINES + 1]
    complete = lines if whole and len(lines) <= _MOST_LINES else lines[:-1]
    rows = [_parsed(line) for line in complete if line.strip()]
    if rows and isinstance(rows[0], dict):
        objects = sum(isinstance(row, dict) for row in rows)
        return "lines" if 2 * objects > len(rows) else None
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return "values" if _OPENING.match(text) else None
    rest = text[end:].lstrip()
    return "values" if not rest or rest[0] in "{[," else None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_values(file: IO[str]) -> Iterator[Any]:
    """The JSON values of a stream in turn; of an array that begins it, its elements.

    Raises ValueError for what is no JSON, and for one value of more than 256 million characters.
    """
    decode = json.JSONDecoder().raw_decode
    text, at = file.read(HEAD_BYTES), 0
    match = re.match(r"\s*\[", text)
    inside = match is not None
    at = match.end() if match else 0
    while True:
        at = _skip(text, at)
        if inside and text[at : at + 1] == "]":
            inside, at = False, at + 1
            continue
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            left = text[at:]
            if len(left) > _LARGEST_VALUE:
                raise ValueError(f"no value ends within {_LARGEST_VALUE:,} characters") from None
            more = file.read(max(HEAD_BYTES, len(left)))  # twice as much each time
            if more:
                text, at = left + more, 0
                continue
            if not left and not inside:
                return
            raise ValueError(f"not JSON ({error})" if left else "the array is not closed") from None
        yield value
        at = end


def _skip(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()
