"""/v1/chat/completions: conversations in, answers out, whole or as events."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nomatmul.serve.answers import (
    ChunkFrame,
    Head,
    encode,
    finish_reason,
    json_response,
    spent_fields,
    whole_answer,
)
from nomatmul.serve.body import read_body
from nomatmul.serve.documents import documented
from nomatmul.serve.job import Delta, Job, Usage
from nomatmul.serve.limits import CHAT_TOKENS
from nomatmul.serve.logprobs import chat_logprobs
from nomatmul.serve.prepare import (
    blame,
    client_of,
    language_model,
    plain_message,
    prepared,
    room,
    sampling_of,
    server_of,
    stop_of,
    submit,
)
from nomatmul.serve.response_format import response_grammar
from nomatmul.serve.schema import ChatRequest
from nomatmul.serve.sse import EventStream
from nomatmul.serve.states import saved_input
from nomatmul.serve.tools import CallDelta, ToolParser, ToolPlan

if TYPE_CHECKING:
    from nomatmul.engine.sampling import Sampling
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.next_turn import NextTurns
    from nomatmul.serve.rendered import Rendered

router = APIRouter(prefix="/v1", tags=["chat"])


@router.post("/chat/completions", openapi_extra=documented(ChatRequest))
async def create(request: Request) -> Response:
    """Answer a conversation."""
    asked = await read_body(request, ChatRequest)
    model = language_model(request, asked.model)
    sampling = sampling_of(asked, model)
    saved = saved_input(server_of(request), model.name, asked.state, list) if asked.state else []
    plan, messages, rendered = await prepared(
        request, lambda: _read(asked, model, saved), heavy=_is_heavy(asked)
    )
    ticket = submit(request, _job(request, asked, model, plan, rendered, sampling))
    key = hashlib.sha256(f"{ticket.job.sampling.seed}\0{rendered.text}".encode()).hexdigest()
    scheduler = server_of(request).scheduler

    def ended(answers: list[dict[str, Any]]) -> None:
        turns: NextTurns = request.app.state.next_turns
        turns.expect(request, model, plan, messages, answers, asked.chat_template_kwargs)

    if asked.stream:
        return EventStream(scheduler, ticket, ChatWriter(model, asked, plan, key, ended))
    deltas = await whole_answer(request, scheduler, ticket)
    choices = [_choice(model, asked, plan, key, delta) for delta in deltas]
    ended([choice["message"] for choice in choices])
    answer = {
        **Head(model, "chat.completion", "chatcmpl").fields(),
        "choices": choices,
        **spent_fields(ticket.usage),
    }
    return json_response(answer)


def _is_heavy(asked: ChatRequest) -> bool:
    """Whether a short body may mean long work: a grammar, a saved text."""
    return bool(asked.response_format or asked.tools or asked.state)


def _read(
    asked: ChatRequest, model: ServedModel, saved: list[dict[str, Any]]
) -> tuple[ToolPlan, list[dict[str, Any]], Rendered]:
    """The tools of a request, its messages, and these as token ids; its grammar is compiled.

    saved: messages of a named state, which stand in front of its own.
    """
    content = response_grammar(asked.response_format) if asked.response_format else None
    with blame("tools"):
        plan = ToolPlan(
            asked.tools,
            asked.tool_choice,
            asked.parallel_tool_calls is not False,
            source=model.source,
            content=content,
        )
    if plan.grammar is not None:
        with blame("tools" if asked.tools else "response_format"):
            plan.held = model.grammars.compile(plan.grammar)  # the scheduler then finds it
    with blame("messages"):
        messages = [*saved, *map(plain_message, asked.messages)]
        return plan, messages, plan.rendered(model, messages, asked.chat_template_kwargs)


def _job(
    request: Request,
    asked: ChatRequest,
    model: ServedModel,
    plan: ToolPlan,
    rendered: Rendered,
    sampling: Sampling,
) -> Job:
    old = asked.max_tokens is not None
    count = room(
        model,
        [rendered.ids],
        asked.n or 1,
        asked.max_tokens if old else asked.max_completion_tokens,
        CHAT_TOKENS,
        ("messages", "max_tokens" if old else "max_completion_tokens"),
    )
    return Job(
        model=model.name,
        prompts=(rendered.ids,),
        max_tokens=count,
        n=asked.n or 1,
        sampling=sampling,
        stop=stop_of(asked),
        end_tokens=model.end_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        grammar=plan.grammar,
        boundaries=rendered.boundaries,
        client=client_of(request),
        timeout=server_of(request).options.timeout,
    )


def _choice(
    model: ServedModel, asked: ChatRequest, plan: ToolPlan, key: str, delta: Delta
) -> dict[str, Any]:
    """One choice of an answer that is whole."""
    parser = plan.parser(f"{key}{delta.index}")
    message = _message([*parser.push(delta.text), *parser.finish()])
    logprobs = chat_logprobs(model.token_bytes, delta.tokens) if asked.logprobs else None
    return {
        "index": delta.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": _reason(parser, delta),
    }


def _message(pieces: list[str | CallDelta]) -> dict[str, Any]:
    """The message that an answer's pieces make."""
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, CallDelta):
            if piece.index == len(calls):
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[piece.index]["function"]["arguments"] += piece.arguments
    said = content or (None if calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return message


def _reason(parser: ToolParser, delta: Delta) -> str | None:
    if parser.calls and delta.finish in ("end", "grammar"):
        return "tool_calls"
    return finish_reason(delta)


class ChatWriter:
    """The chunks of a streamed answer.

    ended: called with the messages of all choices behind the last of them.
    """

    def __init__(
        self,
        model: ServedModel,
        asked: ChatRequest,
        plan: ToolPlan,
        key: str,
        ended: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ) -> None:
        self._model, self._asked, self._plan, self._key = model, asked, plan, key
        head = Head(model, "chat.completion.chunk", "chatcmpl").fields()
        self._frame = ChunkFrame(head, asked.stream_options)
        self._parsers: dict[int, ToolParser] = {}
        self._pieces: dict[int, list[str | CallDelta]] = {}
        self._ended = ended

    def chunks(self, delta: Delta) -> list[str]:
        """See `sse.Writer`: the role first, then news, then the reason of the end."""
        index, found = delta.index, []
        parser = self._parsers.get(index)
        if parser is None:
            parser = self._parsers[index] = self._plan.parser(f"{self._key}{index}")
            found.append(self._chunk(index, '{"role":"assistant","content":"","refusal":null}'))
        pieces = parser.push(delta.text) if delta.text else []
        if delta.finish is not None:
            pieces += parser.finish()
        self._pieces.setdefault(index, []).extend(pieces)
        logprobs = "null"
        if delta.tokens:
            logprobs = encode(chat_logprobs(self._model.token_bytes, delta.tokens))
            pieces = pieces or [""]
        for piece in pieces:
            found.append(self._chunk(index, _delta(piece), logprobs))
            logprobs = "null"  # they stand in the first chunk
        if delta.finish is not None:
            found.append(self._chunk(index, "{}", reason=encode(_reason(parser, delta))))
        return found

    def end(self, usage: Usage) -> list[str]:
        """See `sse.Writer`: a chunk of no choice says what was used, where that was asked for."""
        self._ended([_message(pieces) for _, pieces in sorted(self._pieces.items())])
        return self._frame.end(usage)

    def _chunk(self, index: int, delta: str, logprobs: str = "null", reason: str = "null") -> str:
        return (
            f'{self._frame.head},"choices":[{{"index":{index},"delta":{delta}'
            f',"logprobs":{logprobs},"finish_reason":{reason}{self._frame.tail}'
        )


def _delta(piece: str | CallDelta) -> str:
    if isinstance(piece, str):
        return f'{{"content":{encode(piece)}}}'
    call: dict[str, Any] = {"index": piece.index}
    if piece.id is not None:
        call |= {"id": piece.id, "type": "function"}
    function = {} if piece.name is None else {"name": piece.name}
    call["function"] = {**function, "arguments": piece.arguments}
    return encode({"tool_calls": [call]})
