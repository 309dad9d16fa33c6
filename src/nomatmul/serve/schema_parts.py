"""Parts of a JSON schema: the schemas inside it, and the patterns that a text must follow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MAX_PATTERN = 500  # characters of one pattern
MAX_COUNT = 10_000  # of minLength, maxItems and the like; and of a pattern's {n,m} in all
MAX_TOGETHER = 6  # patterns and formats that one text must follow at a time (allOf, $ref)

# Characters that JSON has no short escape for. Grammars leave \\u escapes out, since with them the
# name of a property could be written a second time in another way.
CONTROL = re.compile("[\\x00-\\x07\\x0b\\x0e-\\x1f\\x7f]")
_ESCAPE = re.compile(
    r"(?<!\\)(?:\\\\)*\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]{1,6})\}|[cva0])"
)
_REPEATED = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def children(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside a schema, with their places ("/properties/x")."""
    if not isinstance(schema, dict):
        return
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(inner := schema.get(name), dict):
            for key, child in inner.items():
                yield f"/{name}/{_escaped(key)}", child
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(inner := schema.get(name), list):
            for number, child in enumerate(inner):
                yield f"/{name}/{number}", child
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield f"/{name}", schema[name]


def pattern_fault(pattern: Any) -> str | None:
    """Why a pattern is refused, None where it is not."""
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        return f"it must be a text of at most {MAX_PATTERN} characters"
    if CONTROL.search(pattern) or any(map(_is_control, _ESCAPE.finditer(pattern))):
        return "control characters cannot be asked for"
    product = 1
    for low, high in _REPEATED.findall(pattern):
        product *= max(int(low), int(high or 0), 1)
    return f"it repeats more than {MAX_COUNT:,} times" if product > MAX_COUNT else None


def most_together(root: dict[str, Any]) -> int:
    """How many patterns one text may have to follow at a time, at most, anywhere in a schema.

    The references in it must lead somewhere.
    """
    return _Together(root).most()


class _Together:
    """How many patterns one text may have to follow at a time, at most.

    Each of them doubles what a state of their common automaton holds.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root, self._known = root, dict[int, int]()

    def most(self) -> int:
        """The most anywhere in the schema."""
        return max(map(self._of, _all(self._root)))

    def _of(self, schema: Any) -> int:
        if not isinstance(schema, dict):
            return 0
        if id(schema) in self._known:  # also one that is being looked at: it refers to itself
            return self._known[id(schema)]
        self._known[id(schema)] = 0
        own = ("pattern" in schema) + ("format" in schema)
        own += sum(self._of(child) for child in schema.get("allOf", ()))
        for name in ("anyOf", "oneOf"):
            own += max((self._of(child) for child in schema.get(name, ())), default=0)
        if "$ref" in schema:
            own += self._of(_target(self._root, schema["$ref"]))
        inner = (self._of(child) for place, child in children(schema) if _is_inside(place))
        self._known[id(schema)] = result = max(own, *inner, 0)
        return result


def _is_inside(place: str) -> bool:
    return place.split("/")[1] in (
        "properties", "patternProperties", "prefixItems", "items", "additionalProperties"
    )  # fmt: skip


def _all(schema: Any) -> Iterator[Any]:
    yield schema
    for _, child in children(schema):
        yield from _all(child)


def _target(root: Any, reference: str) -> Any:
    """What a checked reference leads to."""
    for name in reference.split("/")[1:]:
        root = root[int(name)] if isinstance(root, list) else root[name]
    return root


def _is_control(escape: re.Match[str]) -> bool:
    digits = next(filter(None, escape.groups()), "0")  # \\c, \\v, \\a and \\0 have none
    return int(digits, 16) < 128 and bool(CONTROL.search(chr(int(digits, 16))))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
