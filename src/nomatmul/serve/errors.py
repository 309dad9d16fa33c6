"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}.

Whoever answers a request raises `ApiError`, or a ValueError for a user's fault; what is raised
unforeseen costs status 500 and a line that says nothing of the inside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nomatmul.serve.job import Busy, Closing

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MESSAGES = {
    404: ("Unknown request URL: {method} {path}", "unknown_url"),
    405: ("Not allowed to {method} on {path}", "method_not_allowed"),
}


# Characters of a message and a parameter's name: both may hold words of the request.
_LONGEST, _LONGEST_NAME = 1000, 200


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


class ApiError(Exception):
    """What a client is told: a status, a message, the parameter at fault and a code.

    type: OpenAI's word for the kind; left out, it follows from the status. headers: further ones
    of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _cut(message, _LONGEST), code
        self.param = None if param is None else _cut(param, _LONGEST_NAME)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.type = type or _TYPES.get(status, kind)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of this error."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}

    def response(self) -> Response:
        """The response of this error, also an ASGI application for middlewares."""
        content = json.dumps(self.body()).encode()
        return Response(content, self.status, self.headers, media_type="application/json")


def unknown_model(name: object) -> ApiError:
    """The error of a request for a model that is not served."""
    message = f"The model {short(name)} does not exist; GET /v1/models lists those that do"
    return ApiError(404, message, "model", "model_not_found")


def short(value: object, limit: int = 60) -> str:
    """A value as a message shows it: never more than a few words of it."""
    if value is None or isinstance(value, bool):  # in the words of JSON
        return json.dumps(value)
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error, with nothing of the inside of those unforeseen."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        seconds = max(1, math.ceil(error.retry_after))
        message = f"The server is busy; try again in {seconds} s"
        return ApiError(429, message, code="busy", headers={"Retry-After": str(seconds)})
    if isinstance(error, Closing):
        return ApiError(503, "The server is shutting down", code="shutting_down")
    if isinstance(error, ValueError):
        message = str(error).splitlines()[0] if str(error) else "Bad request"
        return ApiError(400, message, getattr(error, "param", None), "invalid_value")
    return ApiError(500, "The server failed to answer this request", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Make an application answer every error in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message, code = str(error.detail), None
        if error.status_code in _MESSAGES:
            pattern, code = _MESSAGES[error.status_code]
            path = short(request.url.path, 200).strip("'")
            message = pattern.format(method=request.method, path=path)
        status, headers = error.status_code, error.headers
        return ApiError(status, message, code=code, headers=headers).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        *_, name = first["loc"]
        return ApiError(400, f"Invalid {name!r}: {first['msg']}", str(name)).response()

    for kind in (ApiError, Busy, Closing, ValueError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
