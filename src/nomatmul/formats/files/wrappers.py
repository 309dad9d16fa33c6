"""Checkpoints saved from inside a wrapper: compiled, parallel or framework modules.

Such a wrapper puts its own name before, or into, the names of the tensors, or the dict of tensors
lies one level deep in a larger one. Both are undone here, with a warning that says what was done,
for every reader alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nomatmul.formats.errors import FormatError
from nomatmul.formats.files.quantised import Quantised
from nomatmul.formats.files.source import TensorSource

# Put before any module's name by torch.compile, FSDP and activation checkpointing; no layer of a
# model has such a name.
_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_names(names: Iterable[str], anchors: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({plain name: stored name}, wrappers' names that were taken off).

    anchors: names of which the model has one, in order of trust. What stands before it is a
    wrapper's prefix if all tensors have it. Raises FormatError if two names become one.
    """
    found: dict[str, str] = {}
    removed: dict[str, None] = {}
    for stored in names:
        name = stored
        for mark in _INSIDE:
            if mark in name:
                name = name.replace(mark, "")
                removed[mark] = None
        if name in found:
            raise FormatError(f"{found[name]!r} and {stored!r} are one tensor without wrappers")
        found[name] = stored
    prefix = _common_prefix(found, anchors)
    if prefix:
        found = {name.removeprefix(prefix): stored for name, stored in found.items()}
        removed[prefix] = None
    return found, list(removed)


def _common_prefix(names: Mapping[str, str], anchors: Iterable[str]) -> str:
    for anchor in anchors:
        if anchor in names:
            return ""
        for name in names:
            prefix = name.removesuffix(anchor)
            if name.endswith(f".{anchor}") and all(n.startswith(prefix) for n in names):
                return prefix
    return ""


class Unwrapped(TensorSource):
    """A source whose tensors are seen without the names of wrappers around them."""

    def __init__(self, source: TensorSource, names: dict[str, str], removed: list[str]) -> None:
        self._source, self._names, self.nested = source, names, source.nested
        others = {_without(stored, removed): stored for stored in source.left_out}
        self.left_out = {name: source.left_out[stored] for name, stored in others.items()}
        bytes_of = source.byte_shapes()
        self._bytes = {name: stored for name, stored in others.items() if stored in bytes_of}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._source.shapes()
        return {name: shapes[stored] for name, stored in self._names.items()}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        return self._source.read(self._names[name], rows)

    def quantised(self, name: str) -> Quantised | None:
        return self._source.quantised(self._names[name])

    def byte_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._source.byte_shapes()
        return {name: shapes[stored] for name, stored in self._bytes.items()}

    def read_bytes(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return self._source.read_bytes(self._bytes[name], rows)


def _without(name: str, removed: list[str]) -> str:
    for mark in removed:
        name = name.replace(mark, "") if mark in _INSIDE else name.removeprefix(mark)
    return name


def unwrapped(source: TensorSource, anchors: Iterable[str], where: Path) -> TensorSource:
    """`source`, without wrappers' names if there are any; says so in a warning."""
    names, removed = plain_names(source.shapes(), anchors)
    if not removed:
        return source
    marks = ", ".join(map(repr, removed))
    warnings.warn(f"{where}: took the wrapper's prefix {marks} off its tensors", stacklevel=2)
    return Unwrapped(source, names, removed)


def missing_tensor(source: TensorSource, name: str) -> str:
    """Why `name` cannot be read, in words: it is absent, no float, or under another name."""
    words = f"lacks the tensor {name!r}"
    if name in source.left_out:
        return f"{name} has dtype {source.left_out[name]}, expected a float"
    near = next((other for other in source.shapes() if other.endswith(f".{name}")), None)
    return words if near is None else f"{words}; {near!r} has a prefix that not all tensors share"
