"""Names of the files of one GGUF model in several parts, as llama-gguf-split gives them."""

from __future__ import annotations

import re
from pathlib import Path

PART_NAME = "NAME-00001-of-00003.gguf"  # for messages
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """The names of all parts of the model of which a file `name` is one; [] where it is none.

    name: with directories before it or without.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return []
    count = int(match[3])
    names = [f"{match[1]}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]
    return names if name in names else []


def part_paths(path: Path) -> list[Path]:
    """The same of a path; itself alone where it is no part."""
    return [path.with_name(name) for name in part_names(path.name)] or [path]
