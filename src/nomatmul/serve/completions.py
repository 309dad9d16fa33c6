"""/v1/completions: prompts in, their continuations out, whole or as events."""

from __future__ import annotations

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
from nomatmul.serve.errors import ApiError
from nomatmul.serve.job import Delta, Job, Usage
from nomatmul.serve.limits import COMPLETION_TOKENS, check_size
from nomatmul.serve.logprobs import TextLogprobs
from nomatmul.serve.prepare import (
    blame,
    client_of,
    language_model,
    prepared,
    room,
    sampling_of,
    server_of,
    stop_of,
    submit,
)
from nomatmul.serve.schema import CompletionRequest
from nomatmul.serve.sse import EventStream
from nomatmul.serve.states import saved_input

if TYPE_CHECKING:
    from nomatmul.serve.models import ServedModel

router = APIRouter(prefix="/v1", tags=["completions"])

Ids = tuple[int, ...]


@router.post("/completions", openapi_extra=documented(CompletionRequest))
async def create(request: Request) -> Response:
    """Continue prompts."""
    asked = await read_body(request, CompletionRequest)
    model = language_model(request, asked.model)
    sampling, n = sampling_of(asked, model), asked.n or 1
    saved = saved_input(server_of(request), model.name, asked.state, str) if asked.state else ""
    heavy = asked.state is not None  # its text is long, whatever the body's is
    prompts, texts = await prepared(request, lambda: _read(asked, model, saved), heavy)
    params = ("prompt", "max_tokens")
    ticket = submit(
        request,
        Job(
            model=model.name,
            prompts=prompts,
            max_tokens=room(model, prompts, n, asked.max_tokens, COMPLETION_TOKENS, params),
            n=n,
            sampling=sampling,
            stop=stop_of(asked),
            logprobs=asked.logprobs,
            echo=bool(asked.echo),
            client=client_of(request),
            timeout=server_of(request).options.timeout,
        ),
    )
    scheduler, writer = server_of(request).scheduler, CompletionWriter(model, asked, texts)
    if asked.stream:
        return EventStream(scheduler, ticket, writer)
    choices = await whole_answer(request, scheduler, ticket)
    answer = {
        **writer.head,
        "choices": [writer.choice(choice) for choice in choices],
        **spent_fields(ticket.usage),
    }
    return json_response(answer)


def _read(
    asked: CompletionRequest, model: ServedModel, saved: str
) -> tuple[tuple[Ids, ...], list[str]]:
    """(token ids of the prompts, their texts where they are echoed).

    saved: the text of a named state.
    """
    prompts: list[str | list[int]]
    if isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int):
        prompts = [asked.prompt]
    else:
        prompts = list(asked.prompt)
    if saved:
        if not all(isinstance(prompt, str) for prompt in prompts):
            message = "behind a state a prompt is a text, for its tokens depend on what is before"
            raise ApiError(400, message, "prompt", "invalid_value")
        prompts = [f"{saved}{prompt}" for prompt in prompts]
    with blame("prompt"):
        check_size(sum(map(len, prompts)))
    ids, texts = [], []
    for number, prompt in enumerate(prompts):
        with blame(f"prompt[{number}]" if len(prompts) > 1 else "prompt"):
            if isinstance(prompt, str):
                ids.append(model.prompt_ids(prompt))
            else:
                ids.append(tuple(model.language.checked_ids(prompt).tolist()))
        if asked.echo:
            texts.append(prompt if isinstance(prompt, str) else _text(model, prompt))
    return tuple(ids), texts


def _text(model: ServedModel, ids: list[int]) -> str:
    text: str = model.language.tokenizer.decode(ids, skip_special_tokens=True)
    return text


class CompletionWriter:
    """The choices of an answer, and its chunks when it is streamed.

    texts: of the prompts, where they are echoed.
    """

    def __init__(self, model: ServedModel, asked: CompletionRequest, texts: list[str]) -> None:
        self._asked, self._texts, self._model = asked, texts, model
        self.head = Head(model, "text_completion", "cmpl").fields()
        self._frame = ChunkFrame(self.head, asked.stream_options)
        self._begun: set[int] = set()
        self._logprobs: dict[int, TextLogprobs] = {}

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A choice of the news of it."""
        text = self._echoed(delta.index) + delta.text
        return {
            "index": delta.index,
            "text": text,
            "logprobs": self._scored(delta),
            "finish_reason": finish_reason(delta),
        }

    def chunks(self, delta: Delta) -> list[str]:
        """See `sse.Writer`: the reason of the end stands in the last chunk with text."""
        text = self._echoed(delta.index) + delta.text
        if not (text or delta.tokens or delta.finish):
            return []
        return [
            f'{self._frame.head},"choices":[{{"index":{delta.index},"text":{encode(text)}'
            f',"logprobs":{encode(self._scored(delta))}'
            f',"finish_reason":{encode(finish_reason(delta))}{self._frame.tail}'
        ]

    def end(self, usage: Usage) -> list[str]:
        """See `sse.Writer`: a chunk of no choice says what was used, where that was asked for."""
        return self._frame.end(usage)

    def _prompt(self, index: int) -> str:
        return self._texts[index // (self._asked.n or 1)] if self._asked.echo else ""

    def _echoed(self, index: int) -> str:
        """The prompt in front of a choice's first text."""
        if index in self._begun:
            return ""
        self._begun.add(index)
        return self._prompt(index)

    def _scored(self, delta: Delta) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        scores = self._logprobs.get(delta.index)
        if scores is None:
            names = self._model.token_bytes
            scores = TextLogprobs(names, self._asked.logprobs, self._prompt(delta.index))
            self._logprobs[delta.index] = scores
        return scores.fields(delta.tokens)
