"""API keys of a server: a file of them, or one in the environment."""

from __future__ import annotations

import os
import re
import stat
import warnings
from pathlib import Path

VARIABLE = "NOMATMUL_API_KEY"
_LEGAL = re.compile(r"[\x21-\x7e]{8,512}")


def find_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line (# begins a comment), and that of NOMATMUL_API_KEY.

    Warns of a file that others may read. Raises ValueError for a key that no header can carry or
    that is short, naming its line and never the key; OSError for a file that cannot be read.
    """
    found: dict[str, None] = {}
    if file is not None:
        found |= dict.fromkeys(_read(file))
    if key := os.environ.get(VARIABLE):
        found[_checked(key, VARIABLE)] = None
    return tuple(found)


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    keys = [
        _checked(line.strip(), f"{file}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not keys:
        raise ValueError(f"{file} holds no API key; write one a line")
    if os.name == "posix" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.warn(f"others may read the keys in {file}; chmod 600 prevents it", stacklevel=3)
    return keys


def _checked(key: str, where: str) -> str:
    if not _LEGAL.fullmatch(key):
        raise ValueError(
            f"{where}: an API key is 8 to 512 characters of ASCII without spaces (this one is not"
            " shown)"
        )
    return key
