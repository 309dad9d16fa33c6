"""Errors that name what is wrong with a user's file, in one line."""

from __future__ import annotations


class FormatError(ValueError):
    """A file or a directory is missing, damaged, foreign or not understood."""


class WriteError(OSError, ValueError):
    """Writing failed (a full disk, a quota, no permission); nothing was left behind."""
