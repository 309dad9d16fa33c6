"""What answers of both kinds have in common: waiting for them, why they ended, what they cost."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response

from nomatmul.serve.bridge import collect
from nomatmul.serve.errors import ApiError
from nomatmul.serve.job import CUTS, Delta, Ticket, Usage

if TYPE_CHECKING:
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.scheduler import Scheduler
    from nomatmul.serve.schema import StreamOptions

_REASONS = {"stop": "stop", "end": "stop", "grammar": "stop", "length": "length"}
GONE = 499  # status, in logs and metrics alone, of a client that did not wait

# ASCII only: some readers of event streams take U+2028 and the like for ends of lines.
encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Head:
    """What stands in front of every object of one answer.

    kind: "chat.completion" and the like. prefix: of the id.
    """

    model: ServedModel
    kind: str
    prefix: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """id, object, created, model, system_fingerprint (of weights and config)."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": f"fp_{self.model.lm.fingerprint[:16]}",
        }


def finish_reason(delta: Delta) -> str | None:
    """OpenAI's word for why a choice ended, None while it runs."""
    return None if delta.finish is None else _REASONS[delta.finish]


def too_late(seconds: float) -> ApiError:
    """The error of a request that took longer than so many seconds."""
    message = f"The request took longer than the {seconds:g} s that it may take"
    # OpenAI's client would send it again, to no better end
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


def check_whole(ticket: Ticket, delta: Delta) -> None:
    """Raise ApiError where a choice was cut off rather than ended."""
    if delta.finish not in CUTS:
        return
    if delta.finish == "timeout":
        raise too_late(ticket.job.timeout or 0.0)
    if delta.finish == "shutdown":
        raise ApiError(503, "The server shut down before the answer ended", code="shutting_down")
    if delta.finish == "cancelled":
        raise ApiError(GONE, "The client went away", code="cancelled")
    if ticket.unanswerable:
        raise ApiError(400, ticket.error or "There is no such answer", code="unanswerable")
    raise ApiError(500, ticket.error or "The answer failed", code="internal_error")


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`: prompts count once each, however many choices they have."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timing_fields(usage: Usage) -> dict[str, Any]:
    """The `nomatmul` object of an answer: what was computed, and seconds since the submission."""
    seconds = {
        "queue_s": usage.queue_s,
        "first_token_s": usage.first_token_s,
        "total_s": usage.total_s,
    }
    rounded = {key: None if value is None else round(value, 6) for key, value in seconds.items()}
    tokens = {"cached_tokens": usage.cached_tokens, "computed_tokens": usage.computed_tokens}
    return tokens | rounded


def spent_fields(usage: Usage) -> dict[str, Any]:
    """What an answer says of its cost: OpenAI's object and ours."""
    return {"usage": usage_fields(usage), "nomatmul": timing_fields(usage)}


class ChunkFrame:
    """What stands around the choices in every chunk of a streamed answer.

    Written by hand where nothing but text is new: a fast model makes a thousand of them a second.
    head: the fields of `Head`.
    """

    def __init__(self, head: dict[str, Any], options: StreamOptions | None) -> None:
        self._usage = bool(options and options.include_usage)
        self.head = encode(head)[:-1]
        self.tail = '}],"usage":null}' if self._usage else "}]}"

    def end(self, usage: Usage) -> list[str]:
        """A chunk of no choice that says what was used, where that was asked for."""
        if not self._usage:
            return []
        return [f'{self.head},"choices":[],{encode(spent_fields(usage))[1:]}']


async def whole_answer(request: Request, scheduler: Scheduler, ticket: Ticket) -> list[Delta]:
    """All of an answer, one `Delta` a choice; its job ends when the client goes away.

    Raises ApiError for an answer that was cut off.
    """
    work = asyncio.ensure_future(collect(ticket))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(GONE, "The client went away", code="cancelled")
        choices = work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        if not ticket.finished:
            scheduler.cancel(ticket)
    for choice in choices:
        check_whole(ticket, choice)
    return choices


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_response(content: dict[str, Any]) -> Response:
    """A response without FastAPI's own walk through the content."""
    return Response(encode(content).encode(), media_type="application/json")
