"""`response_format` of a request: which grammar it asks for, and what is refused of it."""

from __future__ import annotations

from typing import Any

from nomatmul.serve.grammar import GrammarSpec
from nomatmul.serve.json_schema import (
    NAME,
    SchemaError,
    as_json,
    check_names,
    check_schema,
    check_size,
)

_KEYS = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
_SCHEMA_KEYS = {"name", "description", "schema", "strict"}


def response_grammar(value: Any, param: str = "response_format") -> GrammarSpec | None:
    """The grammar of a `response_format` as it stands in a request; None for {"type": "text"}.

    {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name", "schema", "strict",
    "description"}}. Raises SchemaError. A schema is enforced whether `strict` asks for it or not.
    """
    if value is None:
        return None
    kind = _object(value, param).get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise SchemaError(f"{param}.type must be one of {', '.join(_KEYS)}", f"{param}.type")
    check_names(value, _KEYS[kind], param)
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec("json_object")
    where = f"{param}.json_schema"
    given = _object(value.get("json_schema"), where)
    check_names(given, _SCHEMA_KEYS, where)
    name = given.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SchemaError(
            "the name must have 1 to 64 of the characters a-z, A-Z, 0-9, _ and -", f"{where}.name"
        )
    if not isinstance(given.get("strict", False), bool | None):
        raise SchemaError("strict must be true or false", f"{where}.strict")
    if not isinstance(given.get("description", ""), str | None):
        raise SchemaError("the description must be a text", f"{where}.description")
    schema = check_schema(given.get("schema"), f"{where}.schema")
    check_size([schema], f"{where}.schema")
    return GrammarSpec("json_schema", as_json(schema))


def _object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(f"{param} must be an object", param)
    return value
