"""A directory that is written whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that gets its name when all is in it, and goes where something fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's are its owner's alone
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
