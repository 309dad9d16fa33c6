"""From what a request says to what the scheduler needs: model, sampling, stop strings, room.

Where a request says nothing the model's generation_config.json decides, and where that says
nothing either, OpenAI's defaults do: temperature 1, top_p 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastapi import Request as HttpRequest

from nomatmul.engine.sampling import Sampling
from nomatmul.serve import schema
from nomatmul.serve.errors import ApiError, unknown_model
from nomatmul.serve.limits import MAX_CHOICES, MAX_TOKENS
from nomatmul.serve.offload import offload

if TYPE_CHECKING:
    from collections.abc import Callable

    from nomatmul.serve.job import Job, Ticket
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.server import Server

T = TypeVar("T")

_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))
_SMALL = 4096  # bytes of a body that is made a job of on the event loop itself


def server_of(request: HttpRequest) -> Server:
    """The server that a request has reached."""
    return cast("Server", request.app.state.server)


def language_model(request: HttpRequest, name: str) -> ServedModel:
    """The served model of this name; raises ApiError for none, or an encoder."""
    model: ServedModel | None = server_of(request).models.get(name)
    if model is None:
        raise unknown_model(name)
    if model.kind != "language":
        message = f"model {name!r} is an encoder, which writes no text; use /v1/embeddings"
        raise ApiError(400, message, "model", "model_not_supported")
    request.state.model = name
    return model


@contextlib.contextmanager
def blame(param: str) -> Iterator[None]:
    """Make a ValueError inside an ApiError (400) of this parameter, or of the one it names."""
    try:
        yield
    except ValueError as error:
        message = str(error).splitlines()[0] if str(error) else "it is refused"
        place = getattr(error, "param", None) or param
        raise ApiError(400, message, place, "invalid_value") from None


def plain_message(message: schema.Message) -> dict[str, Any]:
    """A message as templates know it: a developer is a system, parts are lines of one text."""
    fields = message.model_dump(exclude_none=True, exclude={"refusal", "annotations", "parsed"})
    if fields["role"] == "developer":
        fields["role"] = "system"
    if isinstance(fields.get("content"), list):
        fields["content"] = "\n".join(part["text"] for part in fields["content"])
    return fields


def sampling_of(asked: schema.Request, model: ServedModel) -> Sampling:
    """How a request wants tokens to be chosen; raises ApiError for a bias of no token."""
    values: dict[str, object] = {"temperature": 1.0, **model.defaults}
    said = {name: getattr(asked, name, None) for name in _FIELDS}
    values.update({name: value for name, value in said.items() if value is not None})
    values["top_k"] = max(0, cast("int", values.get("top_k", 0)))  # -1, too, means all of them
    values["logit_bias"] = {int(key): value for key, value in (asked.logit_bias or {}).items()}
    sampling = Sampling(**values)  # type: ignore[arg-type]  # the schema has checked the types
    with blame("logit_bias"):
        sampling.check_vocabulary(model.lm.config.vocab_size)
    return sampling


def stop_of(asked: schema.Request) -> tuple[str, ...]:
    """The stop strings of a request."""
    return (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())


def room(
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    asked: int | None,
    default: int,
    params: tuple[str, str],
) -> int:
    """How many tokens each choice may have; the default is cut to the positions that are left.

    params: names of the prompt and of the maximum, for errors. Raises ApiError where prompt and
    maximum exceed the model's positions, or the whole request the limits of a request.
    """
    choices, longest = len(prompts) * n, max(map(len, prompts))
    if choices > MAX_CHOICES:
        message = (
            f"{choices} choices (prompts times n) are more than the {MAX_CHOICES} of a request"
        )
        raise ApiError(400, message, "n", "too_many_choices")
    limit, count = model.language.max_length, default if asked is None else asked
    if limit is not None:
        if longest + (asked or (asked is None)) > limit:
            raise _too_long(limit, longest, asked, params)
        count = min(count, limit - longest)
    if choices * count > MAX_TOKENS:
        message = (
            f"{choices} choices of {count} tokens are {choices * count}; a request may make at"
            f" most {MAX_TOKENS}"
        )
        raise ApiError(400, message, params[1], "too_many_tokens")
    return count


def _too_long(limit: int, prompt: int, asked: int | None, params: tuple[str, str]) -> ApiError:
    own = f"the {params[0]} take{'s' if params[0] == 'prompt' else ''} {prompt}"
    said = f", and {params[1]} asks for {asked} more" if asked else ""
    message = f"This model has a context of {limit} tokens, but {own}{said}"
    param = params[0] if prompt >= limit or not asked else params[1]
    return ApiError(400, message, param, "context_length_exceeded")


async def prepared(request: HttpRequest, work: Callable[[], T], heavy: bool = False) -> T:
    """The result of work on a request's text: done here for a short one, else off the loop."""
    if not heavy and len(await request.body()) <= _SMALL:
        return work()
    return await offload(request, work)


def submit(request: HttpRequest, job: Job) -> Ticket:
    """Hand a job to the scheduler; raises Busy, Closing, and ValueError."""
    ticket: Ticket = server_of(request).scheduler.submit(job)
    request.state.ticket = ticket  # for metrics and the log, which read its usage at the end
    return ticket


def client_of(request: HttpRequest) -> str:
    """Whose turn a request takes: the key or address that the middlewares noted."""
    return cast("str", getattr(request.state, "client", ""))
