"""What the optional parts of the package need, and the one line that installs it.

The line is right for a clone and for a wheel: pip takes the extras of the nomatmul that is
installed, and looks it up nowhere.
"""

from __future__ import annotations

import importlib

_TRAIN = ("torch", "transformers")


def install_line(extra: str = "train") -> str:
    """The command that installs an extra of the installed package."""
    return f'pip install "nomatmul[{extra}]"'


def require_train(what: str, packages: tuple[str, ...] = _TRAIN) -> None:
    """Raises ImportError, one line with the command, unless the packages can be imported."""
    _require(what, packages, "train")


def require_hardware(what: str, packages: tuple[str, ...] = ("amaranth",)) -> None:
    """Like `require_train`, for the extra of the accelerator."""
    _require(what, packages, "hardware")


def _require(what: str, packages: tuple[str, ...], extra: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{what} needs {name} ({error}): {install_line(extra)}") from None
