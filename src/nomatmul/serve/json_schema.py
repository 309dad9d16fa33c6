"""JSON schemas as requests bring them: what is refused before a grammar is made of one.

Refused are keywords that a grammar cannot enforce (an answer must never break its schema), numbers
that a grammar would round, and whatever is too large. Places are JSON pointers ("#/properties/x").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from nomatmul.serve.schema_parts import (
    CONTROL,
    MAX_COUNT,
    MAX_TOGETHER,
    children,
    most_together,
    pattern_fault,
)

MAX_DEPTH = 32  # schemas in schemas
MAX_SCHEMAS = 2000
MAX_WIDTH = 500  # properties of one object, alternatives of one choice
MAX_VALUES = 2000  # of enums, in all
MAX_VALUE = 5000  # characters of one value or name
MAX_TEXT = 120_000  # characters of names, values and patterns, in all
MAX_JSON = 200_000  # characters of a request's schemas as JSON, without their annotations
MAX_PATTERNS = 50  # of one object's patternProperties
MAX_MULTIPLE = 10_000  # digits of multipleOf, read as a whole number

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_IGNORED = frozenset(("$schema", "$id", "id", "$comment", "title", "description", "default",
    "readOnly", "writeOnly", "examples", "deprecated"))  # fmt: skip
_UNSUPPORTED = frozenset(
    """
    not if then else contains minContains maxContains propertyNames dependencies dependentRequired
    dependentSchemas unevaluatedItems unevaluatedProperties additionalItems contentSchema
    contentEncoding contentMediaType $anchor $dynamicRef $dynamicAnchor $recursiveRef
    $recursiveAnchor $vocabulary x-guidance
    """.split()  # noqa: SIM905 - a list of these would be three times as long
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a schema or a function
_TYPES = frozenset(("null", "boolean", "number", "integer", "string", "array", "object"))


class SchemaError(ValueError):
    """A schema that is not accepted. param: where it stands in the request, as a path."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def check_size(schemas: Iterable[dict[str, Any]], param: str) -> None:
    """Raise SchemaError for checked schemas that are too large together."""
    if sum(len(as_json(schema)) for schema in schemas) > MAX_JSON:
        raise SchemaError(f"schemas have more than {MAX_JSON:,} characters as JSON", param)


def as_json(value: Any) -> str:
    """A value as JSON in one line; the order of its keys counts, so it stays."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def check_names(value: dict[str, Any], known: set[str], param: str) -> None:
    """Raise SchemaError for a key that is not known."""
    for name in value:
        if name not in known:
            raise SchemaError(f"Unknown parameter: {name!r}", f"{param}.{name}")


def check_schema(schema: Any, param: str) -> dict[str, Any]:
    """Return a schema without its annotations; param: where it stands in the request.

    Raises SchemaError, naming the place in the schema.
    """
    if not isinstance(schema, dict):
        raise SchemaError(f"a schema must be an object, got {_short(schema)}", param)
    result = _Check(schema, param).whole()
    if most_together(result) > MAX_TOGETHER:
        raise SchemaError(
            f"a text must follow more than {MAX_TOGETHER} patterns at a time (allOf, $ref)", param
        )
    return result


class _Check:
    """One walk through a schema, counting what it holds."""

    def __init__(self, root: dict[str, Any], param: str) -> None:
        self._root, self._param = root, param
        self._values = self._text = 0
        self._places: set[str] = set()
        self._references: list[tuple[str, str]] = []

    def whole(self) -> dict[str, Any]:
        """The schema without annotations, its references followed."""
        result = self._checked(self._root, "#", 0)
        for found, place in self._references:
            if found not in self._places:
                raise self._error(place, f"{_short(found)} leads to no schema")
        return dict(result)

    def _checked(self, schema: Any, place: str, depth: int) -> Any:
        """A schema and all in it, without annotations."""
        self._places.add(place)
        if depth > MAX_DEPTH:
            raise self._error(place, f"schemas are nested more than {MAX_DEPTH} deep")
        if len(self._places) > MAX_SCHEMAS:
            raise self._error("#", f"it holds more than {MAX_SCHEMAS} schemas")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._error(place, f"a schema must be an object, got {_short(schema)}")
        self._keywords(schema, place)
        result = {key: value for key, value in schema.items() if key not in _IGNORED}
        result.pop("uniqueItems", None)
        for where, child in children(schema):
            _, name, *rest = where.split("/", 2)
            inner = self._checked(child, place + where, depth + 1)
            if not rest:
                result[name] = inner
                continue
            if result[name] is schema[name]:
                result[name] = schema[name].copy()
            key = _unescaped(rest[0])
            result[name][int(key) if isinstance(result[name], list) else key] = inner
        return result

    def _keywords(self, schema: dict[str, Any], place: str) -> None:
        for key, value in schema.items():
            self._count_text(key, place)
            if key in _UNSUPPORTED or (key == "uniqueItems" and value is not False):
                raise self._error(f"{place}/{key}", "this keyword is not supported")
            if key in _COUNTS and not (_is_int(value) and 0 <= value <= MAX_COUNT):
                limits = f"a whole number from 0 to {MAX_COUNT:,}"
                raise self._error(f"{place}/{key}", f"it must be {limits}, got {_short(value)}")
            if key in _NUMBERS:
                self._number(value, f"{place}/{key}")
        if "multipleOf" in schema and not _is_multiple(schema["multipleOf"]):
            limit = f"above 0 with digits up to {MAX_MULTIPLE:,}"
            raise self._error(f"{place}/multipleOf", f"it must be a number {limit}")
        self._names(schema, place)
        self._types(schema.get("type", "object"), place)
        for name in ("enum", "const"):
            if name in schema:
                self._value(schema[name], f"{place}/{name}", 0)
        if not isinstance(schema.get("enum", []), list) or schema.get("enum") == []:
            raise self._error(f"{place}/enum", "it must be a list of values, at least one")
        if "format" in schema and schema["format"] not in FORMATS:
            legal = ", ".join(sorted(FORMATS))
            found = _short(schema["format"])
            raise self._error(f"{place}/format", f"{found} is not supported; formats are {legal}")
        for pattern in (schema.get("pattern", ""), *_dict(schema, "patternProperties")):
            self._pattern(pattern, place)
        if "$ref" in schema:
            self._reference(schema["$ref"], f"{place}/$ref")
        if isinstance(schema.get("items"), list):
            raise self._error(f"{place}/items", "it must be one schema; a list is prefixItems")

    def _names(self, schema: dict[str, Any], place: str) -> None:
        """Names of properties, and how many of them there must be."""
        for name in ("properties", "patternProperties", "$defs", "definitions"):
            if not isinstance(schema.get(name, {}), dict):
                raise self._error(f"{place}/{name}", "it must be an object of schemas")
            limit = {"properties": MAX_WIDTH, "patternProperties": MAX_PATTERNS}.get(name)
            if limit is not None and len(_dict(schema, name)) > limit:
                raise self._error(f"{place}/{name}", f"it holds more than {limit} names")
            for key in _dict(schema, name):
                self._count_text(key, place)
        for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if name in schema and not (isinstance(schema[name], list) and schema[name]):
                raise self._error(f"{place}/{name}", "it must be a list of schemas, at least one")
            if len(schema.get(name, ())) > MAX_WIDTH:
                raise self._error(f"{place}/{name}", f"it holds more than {MAX_WIDTH} schemas")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._error(f"{place}/required", "it must be a list of names")
        for name in required:
            self._count_text(name, place)
        # names beyond the required ones may come twice in a text, and count once in its object
        if schema.get("minProperties", 0) > len(set(required)) + 1:
            raise self._error(
                f"{place}/minProperties", "it may exceed the number of required names by one only"
            )

    def _types(self, found: Any, place: str) -> None:
        types = found if isinstance(found, list) else [found]
        if not types or not all(isinstance(kind, str) and kind in _TYPES for kind in types):
            legal = ", ".join(sorted(_TYPES))
            raise self._error(f"{place}/type", f"types are {legal}; got {_short(found)}")

    def _value(self, value: Any, place: str, depth: int) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error(place, f"enums hold more than {MAX_VALUES:,} values")
        if depth > MAX_DEPTH:
            raise self._error(place, f"a value is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            self._count_text(value, place)
            if CONTROL.search(value):
                raise self._error(place, "control characters without a short escape in JSON")
        elif isinstance(value, list):
            for entry in value:
                self._value(entry, place, depth + 1)
        elif isinstance(value, dict):
            for key, entry in value.items():
                self._count_text(key, place)
                self._value(entry, place, depth + 1)
        elif value is not None and not isinstance(value, bool):
            self._number(value, place)

    def _number(self, value: Any, place: str) -> None:
        """A grammar computes with float64: what is not one exactly would be another number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(place, f"it must be a number, got {_short(value)}")
        try:
            exact = math.isfinite(value) and float(value) == value
        except OverflowError:
            exact = False
        if not exact or (value and not 1e-12 <= abs(value) <= 1e18):
            raise self._error(
                place, f"{_short(value)} is beyond what numbers of 64 bits hold exactly, or 1e18"
            )

    def _pattern(self, pattern: Any, place: str) -> None:
        if fault := pattern_fault(pattern):
            raise self._error(f"{place}/pattern", fault)
        self._count_text(pattern, place)

    def _reference(self, found: Any, place: str) -> None:
        if not isinstance(found, str) or not (found == "#" or found.startswith("#/")):
            raise self._error(place, f"references begin with #/, got {_short(found)}")
        if any(letter in found for letter in "~%"):
            raise self._error(place, "names with ~, % or / cannot be referred to")
        self._references.append((found, place))

    def _count_text(self, text: str, place: str) -> None:
        self._text += len(text)
        if len(text) > MAX_VALUE:
            raise self._error(place, f"a name or value has more than {MAX_VALUE:,} characters")
        if self._text > MAX_TEXT:
            raise self._error(place, f"names, values and patterns exceed {MAX_TEXT:,} characters")

    def _error(self, place: str, reason: str) -> SchemaError:
        path = "".join(f".{_unescaped(name)}" for name in place.split("/")[1:])
        return SchemaError(f"{place}: {reason}", self._param + path)


def _is_multiple(value: Any) -> bool:
    digits = Decimal(repr(value)).normalize().as_tuple().digits
    return bool(value > 0) and int("".join(map(str, digits))) <= MAX_MULTIPLE


def _dict(schema: dict[str, Any], name: str) -> dict[str, Any]:
    found = schema.get(name, {})
    return found if isinstance(found, dict) else {}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):  # in the words of JSON
        return json.dumps(value)
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:60] + "..."


def _unescaped(name: str) -> str:
    return name.replace("~1", "/").replace("~0", "~")
