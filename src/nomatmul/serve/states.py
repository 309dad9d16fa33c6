"""Named states: a long text that is read once and stands in front of many requests.

    PUT /v1/states/{name}       {"model": ..., "messages": [...]} or {"model": ..., "prompt": "..."}
    GET /v1/states              all of them
    DELETE /v1/states/{name}    of one model, or of all that have it

The state behind the text is pinned in the cache, and the text is kept with it: a request with
"state": name is answered as if the whole stood in it, which never depends on what is cached.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from nomatmul.serve.answers import json_response, spent_fields, whole_answer
from nomatmul.serve.body import read_body
from nomatmul.serve.cuts import TAIL
from nomatmul.serve.documents import documented
from nomatmul.serve.errors import ApiError
from nomatmul.serve.fields import Fields
from nomatmul.serve.job import Job
from nomatmul.serve.limits import MAX_MESSAGES
from nomatmul.serve.prepare import (
    blame,
    client_of,
    language_model,
    plain_message,
    prepared,
    room,
    server_of,
    submit,
)
from nomatmul.serve.rendered import Rendered
from nomatmul.serve.schema import Message, Name, TemplateOptions, fault
from nomatmul.serve.tools import ToolPlan

if TYPE_CHECKING:
    from nomatmul.serve.cache import StateCache
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.server import Server

T = TypeVar("T")
StateName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

router = APIRouter(prefix="/v1", tags=["states"])


class StateRequest(Fields):
    """PUT /v1/states/{name}: messages, or a prompt."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _either(self) -> StateRequest:
        if (self.messages is None) == (self.prompt is None):
            raise fault("messages", "give messages or a prompt, and not both")
        return self


@router.put("/states/{name}", openapi_extra=documented(StateRequest))
async def put(request: Request, name: StateName) -> Response:
    """Read a text, pin the state behind it, and keep both under the name."""
    asked = await read_body(request, StateRequest)
    model, server = language_model(request, asked.model), server_of(request)
    cache = _cache(server)
    messages = [plain_message(message) for message in asked.messages or ()]
    rendered = await prepared(request, lambda: _read(asked, messages, model))
    param = "prompt" if asked.messages is None else "messages"
    room(model, [rendered.ids], 1, 0, 0, (param, param))
    ticket = submit(
        request,
        Job(
            model=model.name,
            prompts=(rendered.ids,),
            max_tokens=0,
            boundaries=(*rendered.boundaries, len(rendered.ids) - TAIL),
            client=client_of(request),
            timeout=server.options.timeout,
            keep=name,
            document=json.dumps(
                {"prompt": asked.prompt} if asked.prompt else {"messages": messages}
            ),
        ),
    )
    try:
        await whole_answer(request, server.scheduler, ticket)
    except ApiError:
        if ticket.error and repr(name) in ticket.error:  # it has no room
            raise ApiError(400, ticket.error, "name", "state_too_large") from None
        raise
    return json_response({**_card(cache, model.name, name), **spent_fields(ticket.usage)})


def _read(asked: StateRequest, messages: list[dict[str, Any]], model: ServedModel) -> Rendered:
    if asked.prompt is not None:
        with blame("prompt"):
            return Rendered(model.prompt_ids(asked.prompt), (), asked.prompt)
    with blame("messages"):
        plan = ToolPlan(None, source=model.source)
        return plan.rendered(
            model, messages, asked.chat_template_kwargs, add_generation_prompt=False
        )


@router.get("/states")
async def states(request: Request) -> Response:
    """All named states, by model and name."""
    server = server_of(request)
    cache = server.cache
    found: list[dict[str, Any]] = []
    if cache is not None:
        for model in _language_models(server):
            found += [_card(cache, model, name) for name in cache.names(model)]
    return json_response({"object": "list", "data": found})


@router.delete("/states/{name}")
async def delete(
    request: Request, name: StateName, model: Annotated[str | None, Query()] = None
) -> Response:
    """Let a state go."""
    server = server_of(request)
    cache = _cache(server)
    if model is not None:
        language_model(request, model)
    models = _language_models(server) if model is None else [model]
    gone = await _on_engine(request, lambda: [cache.forget(one, name) for one in models])
    if not any(gone):
        raise _unknown(name)
    return json_response({"id": name, "object": "state", "deleted": True})


def saved_input(server: Server, model: str, name: str, kind: type[T]) -> T:
    """What a request's "state" puts in front of its own: messages (kind: list), or a text (str).

    Raises ApiError for none of this name, and for one of the other kind.
    """
    document = None if server.cache is None else server.cache.description(model, name)
    if not document:
        raise _unknown(name)
    values = json.loads(document)
    found = values.get("messages", values.get("prompt"))
    if not isinstance(found, kind):
        other = "/v1/completions" if isinstance(found, str) else "/v1/chat/completions"
        raise ApiError(400, f"the state {name!r} is for {other}", "state", "invalid_value")
    return found


def _cache(server: Server) -> StateCache:
    if server.cache is None:
        raise ApiError(400, "this server keeps no states (--state-cache 0)", code="no_states")
    return server.cache


def _language_models(server: Server) -> list[str]:
    return [name for name, model in server.models.items() if model.kind == "language"]


def _card(cache: StateCache, model: str, name: str) -> dict[str, Any]:
    ids = cache.named(model, name) or ()
    return {"id": name, "object": "state", "model": model, "tokens": len(ids)}


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"there is no state {name[:128]!r}", "state", "state_not_found")


async def _on_engine(request: Request, work: Callable[[], T]) -> T:
    """The result of short work of the engine thread, which alone changes the cache."""
    future = server_of(request).scheduler.call(work, client_of(request))
    return await asyncio.wrap_future(future)
