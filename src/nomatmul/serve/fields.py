"""Base of the requests' schemas: strict types, and errors that name the parameter at fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from nomatmul.serve.errors import ApiError, short

Loc = tuple[int | str, ...]
F = TypeVar("F", bound="Fields")


class Fields(BaseModel):
    """An object of a request: "1" is no number, 1.0 no whole number, unknown fields are refused.

    refused: fields of OpenAI's that would change the answer and are not supported, with the reason;
    null, or a value that asks for nothing, passes.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.refused:
            return values
        for name in cls.refused.keys() & values.keys():
            if values[name]:
                found = {"name": name, "reason": cls.refused[name]}
                raise PydanticCustomError("refused", "{name}: {reason}", found)
        return {key: value for key, value in values.items() if key not in cls.refused}


def checked(schema: type[F], values: Any) -> F:
    """The values as an object of the schema; raises ApiError (400) naming the first fault."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explained(error, values) from None


def param_name(loc: Sequence[int | str]) -> str:
    """messages[0].content for ("messages", 0, "content")."""
    name = ""
    for part in loc:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _explained(error: ValidationError, values: Any) -> ApiError:
    """The fault that was meant: a union finds one with each of its members."""
    items: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    found = [(_path(item, values), item) for item in items]
    path, first = max(found, key=_meant)
    kind, context = first["type"], first.get("ctx", {})
    param = param_name((*path, context["name"]) if kind in ("refused", "fault") else path)
    if kind == "refused":
        message = f"'{param}' is not supported: {context['reason']}"
        return ApiError(400, message, param, "unsupported_parameter")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {short(param)}", param, "unknown_parameter")
    if kind in ("missing", "union_tag_not_found"):
        code = "missing_required_parameter"
        return ApiError(400, f"Missing required parameter: '{param}'", param, code)
    here = [item for other, item in found if other == path]
    exact = [item for item in here if not item["type"].endswith("_type")] or here
    reason = " or: ".join(dict.fromkeys(_reason(item) for item in exact))
    where = f"Invalid '{param}': " if param else ""
    code = "invalid_type" if exact[0]["type"].endswith("_type") else "invalid_value"
    return ApiError(400, f"{where}{reason}", param or None, code)


def _meant(entry: tuple[Loc, dict[str, Any]]) -> tuple[bool, int, int]:
    """How close a member of a union came: its types fit, and it got far."""
    path, item = entry
    last = path[-1] if path else 0
    return not item["type"].endswith("_type"), len(path), last if isinstance(last, int) else 0


def _reason(item: dict[str, Any]) -> str:
    """What is wrong, and the value where it is a short one."""
    context, value = item.get("ctx", {}), item["input"]
    if item["type"] == "fault":
        return str(context["reason"])
    if item["type"] == "union_tag_invalid":
        return f"it must be one of {context['expected_tags']}, got {short(context['tag'])}"
    reason = str(item["msg"]).replace("Input should be", "it must be")
    return reason if isinstance(value, dict | list) else f"{reason}, got {short(value)}"


def _path(item: dict[str, Any], values: Any) -> Loc:
    """Where in the request an error lies: pydantic's place without the names of unions' members."""
    path: list[int | str] = []
    for number, part in enumerate(item["loc"]):
        last = number == len(item["loc"]) - 1
        inside = (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if inside:
            path.append(part)
            values = values[part]
        elif last and item["type"] == "missing":
            path.append(part)
    if item["type"].startswith("union_tag"):
        path.append("role")
    return tuple(path)
