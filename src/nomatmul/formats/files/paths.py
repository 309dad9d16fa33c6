"""Paths that callers hand in."""

from __future__ import annotations

import os
from pathlib import Path


def checked_path(path: object, what: str) -> Path:
    """The path of `what`; raises ValueError for no path, or an empty one.

    An empty text, as a shell gives for a variable that is not set, would be the working directory.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"the path of {what} must be a non-empty text or a Path, got {path!r}")
    return Path(path)
