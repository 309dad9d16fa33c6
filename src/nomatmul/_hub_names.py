"""Names of models on the Hugging Face Hub: `hf:owner/name[/file.gguf][@revision]`.

What such a name leads to is downloaded by `formats.hub` and packed by `convert.hub`. Whoever loads
models lies below the room that packs, so the package puts that in here when it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

PREFIX = "hf:"
_OWNER_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_packer: Callable[[str], Path] | None = None


def is_hub_name(path: object) -> bool:
    """Whether a model's path is a name on the Hub."""
    return isinstance(path, str | Path) and str(path).startswith(PREFIX)


def hub_advice(path: object) -> str:
    """What to add to "PATH does not exist": the name on the Hub that it looks like, or nothing."""
    looks_like = _OWNER_NAME.fullmatch(str(path)) is not None
    return f"; a model of the Hugging Face Hub is {PREFIX}{path}" if looks_like else ""


def set_packer(packer: Callable[[str], Path]) -> None:
    """Say what makes a packed directory of a name."""
    global _packer
    _packer = packer


def packed_directory(name: str | Path) -> Path:
    """The packed directory of a name, which is downloaded and packed where it has to be.

    Raises ValueError or OSError when that fails, ImportError without huggingface_hub.
    """
    assert _packer is not None, "nomatmul/__init__.py sets it"
    return _packer(str(name))
