"""Training text from a pipe: copied to a temporary file first, because it is read several times.

What kind it is, the tokenizer, the tokens and the checksum each take a pass, and a pipe has one.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from typing import Any

from nomatmul.formats.files.texts import STANDARD_INPUT, open_raw


def is_pipe(name: str) -> bool:
    """Whether a name is standard input ("-") or a file that can be read only once."""
    if name == STANDARD_INPUT:
        return True
    try:
        mode = os.stat(name).st_mode
    except OSError:  # whoever opens it says so
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def copied(name: str) -> Any:
    """All of a pipe in a `NamedTemporaryFile`, which lives as long as this object.

    Raises ValueError for a device; OSError, also when the disk of the temporary folder ($TMPDIR)
    is full.
    """
    copy = tempfile.NamedTemporaryFile(prefix="nomatmul-")  # noqa: SIM115 - closed by its owner
    with open_raw(name) as pipe:
        shutil.copyfileobj(pipe, copy, 1 << 20)
    copy.flush()
    return copy


def refuse_repeated(names: list[str]) -> None:
    """Raise ValueError when one pipe is named twice: the second reading would find it empty."""
    seen: set[tuple[int, int]] = set()
    for name in names:
        if not is_pipe(name):
            continue
        facts = os.fstat(0) if name == STANDARD_INPUT else os.stat(name)
        if (facts.st_dev, facts.st_ino) in seen:
            raise ValueError(f"{name} is named twice, but a pipe can be read only once")
        seen.add((facts.st_dev, facts.st_ino))
