"""The native module, imported once and only when asked for; how many threads it gets."""

from __future__ import annotations

from typing import Any

from nomatmul.formats.cpus import usable_cpus


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


def default_threads() -> int:
    """One a physical core that this process may use, and no more than its CPU quota."""
    return min(int(native().default_threads()), usable_cpus())
