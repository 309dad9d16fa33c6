"""The native module, imported once and only when asked for."""

from __future__ import annotations

from typing import Any


def native() -> Any:
    """Return the module `nomatmul._native`; raises ImportError with what to do about it."""
    try:
        from nomatmul import _native
    except ImportError as error:
        raise ImportError(
            f"the native core of nomatmul is missing or does not fit this Python ({error});"
            " install the package again with a C++17 compiler at hand"
        ) from None
    return _native
