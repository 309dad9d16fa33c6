"""Reading JSON objects, strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nomatmul.formats.errors import FormatError

# What a JSON object holds is for its reader to check.
JsonObject = dict[str, Any]


def read_json_object(path: str | Path, data: bytes | None = None) -> JsonObject:
    """Read the JSON object in the file `path` (or in `data`, already read from there).

    Raises FormatError in one line when it is missing, unreadable, no JSON, no object, or names
    a key twice.
    """
    if data is None:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> JsonObject:
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def check_keys(what: str, values: object, legal: set[str]) -> None:
    """Raise FormatError unless `values` is an object with exactly these keys."""
    if not isinstance(values, dict):
        raise FormatError(f"{what}: a JSON object is needed, found {type(values).__name__}")
    unknown, missing = set(values) - legal, legal - set(values)
    if unknown or missing:
        word, key = ("unknown", min(unknown)) if unknown else ("missing", min(missing))
        raise FormatError(f"{word} {what} {key!r}")
