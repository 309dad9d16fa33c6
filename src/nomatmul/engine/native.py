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


def checked_threads(threads: int) -> int:
    """Return the number of threads asked for; raises ValueError for one below 1."""
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be a whole number from 1 to 1024, got {threads!r}")
    return threads
