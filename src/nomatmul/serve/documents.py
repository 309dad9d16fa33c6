"""Schemas of bodies for /openapi.json: `read_body` reads them, so FastAPI does not know them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from nomatmul.serve.fields import Fields

_PLACE = "#/components/schemas/{model}"
_KNOWN: dict[str, type[Fields]] = {}


def documented(schema: type[Fields]) -> dict[str, Any]:
    """What a route's `openapi_extra` says about its body."""
    _KNOWN[schema.__name__] = schema
    content = {"application/json": {"schema": {"$ref": _PLACE.format(model=schema.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def add_schemas(app: FastAPI) -> None:
    """Make an application's /openapi.json hold the schemas that `documented` has seen."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        fresh = app.openapi_schema is None
        document = described()
        if fresh:
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in _KNOWN.items():
                whole = schema.model_json_schema(ref_template=_PLACE)
                schemas.update(whole.pop("$defs", {}))
                schemas[name] = whole
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it
