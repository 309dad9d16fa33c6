"""How the C library hands memory back: a server runs for weeks, and sizes of requests differ.

glibc raises its limit for blocks of their own after each large one, and gives every thread a heap:
texts of megabytes then lie between small blocks, and resident memory grows in steps for hours (a
soak of twenty minutes: 195 to 220 MB). With fixed limits large blocks go back at once; what is left
free between small ones is a third of the heap after a quarter of an hour, and its whole pages go
back when asked for (3 to 5 MB each ten seconds under 64 clients, in a millisecond).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of <malloc.h>


def return_large_blocks() -> bool:
    """Fix glibc's limits for this process, before it has threads; False where there is no glibc."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    taken = [mallopt(_MMAP_THRESHOLD, 256 << 10), mallopt(_TRIM_THRESHOLD, 1 << 20)]
    taken.append(mallopt(_ARENA_MAX, 2))
    return all(taken)


def return_free_pages() -> bool:
    """Give whole free pages of the heap back to the system; False where there is no glibc."""
    trim = _glibc("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def _glibc(name: str) -> Any:
    """A function of glibc, None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
