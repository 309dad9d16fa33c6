"""Checks of a config's fields that name the value and its limits."""

from __future__ import annotations

import sys


def check_dial(name: str, value: object, legal: tuple[str, ...]) -> None:
    """Raise ValueError for a word that is not one of the legal ones."""
    if not isinstance(value, str) or value not in legal:
        choices = ", ".join(map(repr, legal))
        raise ValueError(f"{name} {value!r} is unknown; legal values are {choices}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise ValueError for what is no whole number, or outside low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is out of range; it must lie in {low}..{high}")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError for what is no number, not finite, or not above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= sys.float_info.max:  # of whole numbers, too, which may be longer
        raise ValueError(f"{name} {value} must be finite and above 0")
