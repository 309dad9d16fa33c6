"""The JSON body of a request, read strictly: what Python's own reader lets pass is refused here.

NaN and infinities, numbers too large for a float, keys given twice, half surrogates and NUL
characters: each is a 400 that names the parameter where there is one.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import Request

from nomatmul.serve.errors import ApiError, short
from nomatmul.serve.fields import F, Loc, checked, param_name
from nomatmul.serve.offload import offload

_SMALL = 1 << 16  # bytes that are parsed at once; a longer body is parsed off the event loop


async def read_body(request: Request, schema: type[F]) -> F:
    """The body of a request as an object of a schema; raises ApiError (400) for any other."""
    data = await request.body()
    if len(data) <= _SMALL:
        return checked(schema, parse(data))
    return await offload(request, lambda: checked(schema, parse(data)))


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a body; raises ApiError (400)."""
    try:
        text = data.decode("utf-8")
        values = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:  # among them what is no UTF-8
        raise ApiError(400, f"The body is not valid JSON: {_line(error)}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"The body must be a JSON object, got {short(values)}")
    if "\\u" in text:  # the only way to spell them
        _check_text(values, ())
    return values


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines and not isinstance(error, RecursionError) else "it is nested too deep"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {short(twice)} appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {short(digits)} is too large")
    return value


def _check_text(value: Any, loc: Loc) -> None:
    """Raise ApiError for a text, at any depth, with a half surrogate or a NUL character."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_text(name, (*loc, _shown(name)))
            _check_text(part, (*loc, _shown(name)))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _check_text(part, (*loc, number))
    elif isinstance(value, str):
        param, at = param_name(loc), value.find("\0")
        if at >= 0:
            raise ApiError(400, f"Invalid '{param}': NUL at {at}", param, "invalid_value")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"Invalid '{param}': half a character (a lone surrogate) at {error.start}"
            raise ApiError(400, message, param, "invalid_value") from None


def _shown(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")
