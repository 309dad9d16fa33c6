"""`response_format` of a request: which grammar it asks for, and what is refused of a schema."""

from __future__ import annotations

from typing import Any

from nomatmul.serve.grammar import GrammarSpec


class SchemaError(ValueError):
    """A schema that is not accepted. param: where it stands in the request, as a path."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def response_grammar(value: Any, param: str = "response_format") -> GrammarSpec | None:
    """The grammar of a `response_format` as it stands in a request; None for {"type": "text"}.

    {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name", "schema", "strict",
    "description"}}. Raises SchemaError.
    """
    raise NotImplementedError
