"""Builds the AVX-512 and AMX kernels against software stand-ins for their instructions."""

from __future__ import annotations

from typing import Any


def build() -> Any:
    """Return the emulated kernels, or a string that says why there are none."""
    return "not built yet"
